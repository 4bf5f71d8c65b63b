"""V1, V2, V4, V5, V6: the compressed cache against transformers and against a −inf-mask oracle."""

from __future__ import annotations

import copy

import pytest
import torch

from kvcompress import accounting
from kvcompress.errors import KVCompressError, PlanError, UnsupportedModelError
from kvcompress.plan import Budget, HeadPlan
from kvcompress.registry import SUMS
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.names import as_argument, cache_of
from tests.runtime import oracle
from tests.runtime.battery import EXACT, FULL, plan_for
from tests.runtime.models import SUPPORTED, build, falcon
from tests.runtime.models import prompts as random_prompts

PADS = [7, 1, 0]
# float32 sums in another order; weights are sharpened, so logits reach 10
TOLERANCE = 1e-5

KEEP_SETS = {
    "sink": HeadPlan(**EXACT),
    "local": HeadPlan(local=Budget(tokens=12), **EXACT),
    "special": HeadPlan(special=True, **EXACT),
    "punct": HeadPlan(special=True, punct=True, **EXACT),
    "punct_local": HeadPlan(punct=True, local=Budget(ratio=0.2), **EXACT),
    "frequent": HeadPlan(frequent=Budget(tokens=9), **EXACT),
    "fastgen": HeadPlan(
        special=True, punct=True, frequent=Budget(ratio=0.1), local=Budget(ratio=0.15), **EXACT
    ),
}


def prompts(batch, length, pads=None):
    return random_prompts(batch, length, None if pads is None else pads[:batch])


def greedy(model, inputs, **kw):
    return model.generate(
        **inputs,
        **{"max_new_tokens": 30, "do_sample": False, **kw},
        return_dict_in_generate=True,
        output_logits=True,
    )


def compressed_logits(model, plan, inputs, tokens, params=None):
    attach(model, plan, params)
    try:
        return oracle.feed(model, CompressedCache(plan, params), inputs, tokens)
    finally:
        detach(model)


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("head", [FULL, HeadPlan(frequent=Budget(tokens=500), **EXACT)])
def test_v1_budget_beyond_the_context_changes_nothing(family, head):
    model, inputs = build(family), prompts(3, 60, PADS)
    expected = greedy(model, inputs)
    attach(model, plan_for(model, head))
    got = greedy(model, inputs)
    assert isinstance(cache_of(got), CompressedCache)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 8},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_v1_ways_of_calling(family, way):
    model, inputs = build(family), prompts(3, 40, PADS)
    torch.manual_seed(3)
    expected = greedy(model, inputs, **way)
    attach(model, plan_for(model, FULL))
    torch.manual_seed(3)
    got = greedy(model, inputs, **way)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("keep", [*KEEP_SETS, "mixed"])
def test_v2_dropped_equals_masked(family, keep):
    model, inputs = build(family), prompts(2, 48, PADS)
    heads = KEEP_SETS.values() if keep == "mixed" else [KEEP_SETS[keep]]
    plan = plan_for(model, *heads)
    tokens = prompts(2, 60)["input_ids"][:, 48:]
    expected, dropped = oracle.run(model, plan, inputs, tokens)
    got = compressed_logits(model, plan, inputs, tokens)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert dropped > 0


@pytest.mark.parametrize("scorer", ["raw", "mean", "lift", "random", "key_norm"])
@pytest.mark.parametrize("score_queries", [(None, None), (8, None), (5, 4)])
def test_v2_scorers(scorer, score_queries):
    rows, stride = score_queries if scorer in SUMS else (score_queries[0], None)
    model, inputs = build("llama"), prompts(2, 48, PADS)
    settings = {"scorer": scorer, "score_rows": rows, "score_stride": stride}
    plan = plan_for(model, KEEP_SETS["frequent"], **settings)
    tokens = prompts(2, 64)["input_ids"][:, 48:]
    expected, dropped = oracle.run(model, plan, inputs, tokens)
    got = compressed_logits(model, plan, inputs, tokens)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert dropped > 0


@pytest.mark.parametrize("score_queries", [(None, None), (7, None), (5, 4)])
@pytest.mark.parametrize("family", [*SUPPORTED, "llama4", "gpt_oss", "gemma3n"])
def test_v2_who_votes(family, score_queries):
    model, inputs = build(family), prompts(2, 48, PADS)
    heads = [KEEP_SETS["frequent"], KEEP_SETS["fastgen"]]
    plan = plan_for(model, *heads, score_rows=score_queries[0], score_stride=score_queries[1])
    tokens = prompts(2, 60)["input_ids"][:, 48:]
    expected, dropped = oracle.run(model, plan, inputs, tokens)
    attach(model, plan)
    got = oracle.feed(model, new_cache(model), inputs, tokens)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert dropped > 0


def test_v4_one_query_per_kv_head_equals_a_group():
    grouped, inputs = build("llama"), prompts(2, 50, [3, 0])
    single = build("llama_mha")
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    single.load_state_dict(state)
    heads = [HeadPlan(local=Budget(tokens=20), k_dtype="int8", v_dtype="int4"), KEEP_SETS["local"]]
    small = plan_for(grouped, *heads)
    wide = plan_for(single, FULL)
    wide = wide.model_copy(
        update={"heads": tuple(tuple(h for h in row for _ in range(2)) for row in small.heads)}
    )
    tokens = prompts(2, 80)["input_ids"][:, 50:70]
    got = compressed_logits(single, wide, inputs, tokens)
    expected = compressed_logits(grouped, small, inputs, tokens)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("family", "dtypes"),
    [
        *((family, ("int8", "int4")) for family in SUPPORTED),
        ("llama", ("int8", "int8")),
        ("llama", ("fp8", "fp8")),
        ("llama", ("model", "int4")),
    ],
)
def test_v5_bytes_equal_the_accounting(family, dtypes):
    model, inputs = build(family), prompts(3, 60, PADS)
    k_dtype, v_dtype = dtypes
    heads = [
        HeadPlan(full=True, k_dtype=k_dtype, v_dtype=v_dtype),
        HeadPlan(
            frequent=Budget(ratio=0.2), local=Budget(tokens=9), k_dtype=k_dtype, v_dtype=v_dtype
        ),
        HeadPlan(local=Budget(ratio=0.5), k_dtype="int8", v_dtype="int8"),
        HeadPlan(),
    ]
    plan = plan_for(model, *heads)
    attach(model, plan)
    cache = cache_of(greedy(model, inputs, max_new_tokens=36))
    held = sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in layer.state.tensors()
    )
    prompt = [60 - pad for pad in PADS]
    expected = accounting.cache_bytes(plan, [n + 35 for n in prompt], prompt)
    assert cache.nbytes() == held == expected
    assert cache.get_seq_length() == 60 + 35


def test_v5_every_tensor_is_counted():
    model, inputs = build("llama"), prompts(2, 60)
    attach(model, plan_for(model, *KEEP_SETS.values()))
    state = cache_of(greedy(model, inputs)).layers[0].state
    found = {id(t) for t in state.tensors()}
    for group in state.groups:
        owners = [group.store, group.store.keys, group.store.values, group]
        for owner in owners:
            for name in owner.__slots__:
                value = getattr(owner, name)
                if isinstance(value, torch.Tensor) and name != "index":
                    assert id(value) in found, name


@pytest.mark.parametrize(
    ("k_dtype", "v_dtype", "tolerance"),
    [
        ("model", "model", TOLERANCE),
        (
            "int8",
            "int4",
            1e-3,
        ),  # another batch sums in another order, and a code may round the other way
    ],
)
def test_v6_a_padded_row_equals_the_row_alone(k_dtype, v_dtype, tolerance):
    model = build("llama")
    heads = [head.model_copy(update={"k_dtype": k_dtype, "v_dtype": v_dtype}) for head in
             (*KEEP_SETS.values(), FULL)]  # fmt: skip
    plan = plan_for(model, *heads)
    pads = [20, 3, 0]
    inputs = prompts(3, 60, pads)
    tokens = prompts(3, 85)["input_ids"][:, 60:]
    together = compressed_logits(model, plan, inputs, tokens)
    for row, pad in enumerate(pads):
        alone = {k: v[row : row + 1, pad:] for k, v in inputs.items()}
        single = compressed_logits(model, plan, alone, tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, atol=tolerance, rtol=0)


def test_a_second_turn_equals_masked():
    """Multi-token chunk on a non-empty cache: stored tokens compete with the new chunk."""
    model, inputs = build("llama"), prompts(2, 40)
    plan = plan_for(model, *KEEP_SETS.values())
    attach(model, plan)
    cache = CompressedCache(plan)
    with torch.no_grad():
        model(**inputs, **as_argument(cache))
        turn = prompts(2, 60)["input_ids"][:, 40:60]
        got = model(input_ids=turn, **as_argument(cache)).logits[:, -1]
    detach(model)
    reference = oracle.Oracle(plan, torch.cat([inputs["input_ids"], turn], 1), torch.ones(2, 60))
    oracle.AttentionInterface.register(oracle.NAME, reference.attention)
    oracle.AttentionMaskInterface.register(oracle.NAME, oracle.sdpa_mask)
    model.set_attn_implementation(oracle.NAME)
    full = oracle.DynamicCache(config=model.config)
    with torch.no_grad():
        reference.new_tokens = 40
        model(**inputs, **as_argument(full))
        reference.new_tokens = 20
        expected = model(input_ids=turn, **as_argument(full)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_a_copied_cache_goes_on_alone():
    model, inputs = build("llama"), prompts(2, 40)
    plan = plan_for(model, HeadPlan(frequent=Budget(tokens=6)), HeadPlan(full=True))
    attach(model, plan)
    cache = CompressedCache(plan)
    with torch.no_grad():
        model(**inputs, **as_argument(cache))
        kept, tokens = copy.deepcopy(cache), torch.full((2, 1), 9)
        first = model(input_ids=tokens, **as_argument(cache)).logits
        again = model(input_ids=tokens, **as_argument(kept)).logits
    assert torch.equal(first, again)
    assert kept.plan is cache.plan


def test_a_bypassing_model_is_refused():
    model = falcon()
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM.*bypasses"):
        attach(model, plan_for(build("llama"), FULL))


def test_a_cache_without_attach_is_refused():
    model, inputs = build("llama"), prompts(1, 10)
    cache = CompressedCache(plan_for(model, FULL))
    with torch.no_grad(), pytest.raises(KVCompressError, match="call kvcompress.attach"):
        model(**inputs, **as_argument(cache))


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(PlanError, match="config_hash"):
        attach(build("qwen3"), plan_for(build("llama"), FULL))


def test_detach_gives_the_model_back():
    model, inputs = build("llama"), prompts(2, 30)
    expected = greedy(model, inputs)
    attach(model, plan_for(model, HeadPlan()))
    assert not torch.equal(greedy(model, inputs).sequences, expected.sequences)
    detach(model)
    again = greedy(model, inputs)
    assert torch.equal(again.sequences, expected.sequences)
    assert not isinstance(cache_of(again), CompressedCache)
