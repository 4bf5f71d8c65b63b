"""The static cache against the growing one, eager and compiled: same tokens, one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from kvcompress.accounting import cache_bytes
from kvcompress.errors import KVCompressError, PositionRangeWarning
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache, static_cache_bytes
from kvcompress.runtime.static.moves import thaw
from tests.runtime.models import build, prompts

EXACT = {"k_dtype": "model", "v_dtype": "model"}
PADS = [7, 1, 0]
PUNCT, SPECIAL = tuple(range(5, 13)), (30, 31, 32, 33)
# float32 sums in another order; model logits are of standard deviation 1 to 2
TOLERANCE = 1e-5
MAX_TOKENS = 96

HEADS = {
    "full": HeadPlan(full=True, **EXACT),
    "sink": HeadPlan(**EXACT),
    "local": HeadPlan(local=Budget(tokens=12), **EXACT),
    "frequent": HeadPlan(frequent=Budget(tokens=9), **EXACT),
    "special": HeadPlan(special=True, **EXACT),
    "punct": HeadPlan(special=True, punct=True, **EXACT),
    "punct_local": HeadPlan(punct=True, local=Budget(ratio=0.2), **EXACT),
    "capped": HeadPlan(special=True, punct=True, local=Budget(tokens=9), cap=6, **EXACT),
    "fastgen": HeadPlan(
        special=True, punct=True, frequent=Budget(ratio=0.1), local=Budget(ratio=0.15), **EXACT
    ),
    "capped_fastgen": HeadPlan(special=True, punct=True, frequent=Budget(tokens=6), cap=8, **EXACT),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def plan_for(model: PreTrainedModel, *heads: HeadPlan, **settings) -> Plan:
    """Heads of the model, layer by layer, follow `heads` in turn."""
    shape = shape_of(model.config, model.dtype)
    settings = {
        "sink_tokens": 2,
        "recent_tokens": 5,
        "punct_ids": PUNCT,
        "special_ids": SPECIAL,
        **settings,
    }
    numbers = [
        [layer * shape.kv_heads + h for h in range(shape.kv_heads)] for layer in range(shape.layers)
    ]
    rows = tuple(tuple(heads[n % len(heads)] for n in row) for row in numbers)
    return uniform(shape, heads[0], **settings).model_copy(update={"heads": rows})


def one_layer(family: str) -> PreTrainedModel:
    """Its keys follow from the ids alone, so no rounding moves a code."""
    model = build(family)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def decode(
    model: PreTrainedModel,
    step: Callable,
    cache: CompressedCache,
    inputs: dict[str, torch.Tensor],
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy logits ``[B, steps + 1, vocab]`` and tokens ``[B, steps]``; `model` runs the prompt,
    `step` what follows."""
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=position, **as_argument(cache)).logits[:, -1]
    position, logits, tokens = position[:, -1:], [out], []
    for _ in range(steps):
        tokens.append(out.argmax(-1, keepdim=True))
        position = position + 1
        out = step(input_ids=tokens[-1], position_ids=position, **as_argument(cache))
        out = out.logits[:, -1].clone()
        logits.append(out)
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def assert_equal(got, expected, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=0)
    assert torch.equal(got[1], expected[1])


def held(cache: CompressedCache) -> list[dict[tuple[int, int], tuple[torch.Tensor, ...]]]:
    """Per layer and (row, KV head): positions, key codes and value codes, by position."""
    layers = []
    for layer in cache.compressed_layers:
        state = layer.state if layer.state is not None else thaw(layer.fixed)
        found = {}
        for group in state.groups:
            for bucket in group.store.buckets():
                for s in range(len(bucket.batch)):
                    order = bucket.position[s].argsort()
                    order = order[bucket.position[s][order] >= 0]
                    codes = (bucket.keys.data[s][order], bucket.values.data[s][order])
                    where = int(bucket.batch[s]), group.heads[int(bucket.head[s])]
                    found[where] = (bucket.position[s][order], *codes)
        layers.append(found)
    return layers


@contextmanager
def one_graph() -> Iterator[None]:
    """Whatever is compiled inside is one graph, without a break and without a second version."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ---- the same tokens, eager
ALL = tuple(HEADS)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *((f, ALL[shift::3]) for f in ("llama", "mistral", "gemma2") for shift in range(3)),
        ("gpt_oss", ALL[1::2]),  # learned sinks
        ("llama4", ALL[::2]),  # chunked attention
    ],
)
def test_equals_the_growing_cache(family, names):
    model, inputs = build(family), prompts(3, 40, PADS)
    plan = plan_for(model, *(HEADS[name] for name in names))
    attach(model, plan)
    grown = CompressedCache(plan)
    expected = decode(model, model, grown, inputs, 30)
    cache = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS)
    assert_equal(decode(model, model, cache, inputs, 30), expected)
    for mine, theirs in zip(held(cache), held(grown), strict=True):
        for where, (positions, *_) in theirs.items():
            assert torch.equal(mine[where][0], positions), where


@pytest.mark.parametrize("scorer", ["raw", "mean", "lift", "random", "key_norm"])
def test_scorers(scorer):
    model, inputs = build("llama"), prompts(2, 40, PADS[:2])
    plan = plan_for(model, HEADS["frequent"], scorer=scorer, score_rows=9)
    attach(model, plan)
    expected = decode(model, model, CompressedCache(plan), inputs, 30)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS)
    assert_equal(decode(model, model, cache, inputs, 30), expected)


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_a_prompt_shorter_than_the_exact_slots(prompt):
    model, inputs = build("llama"), prompts(2, prompt)
    plan = plan_for(model, HEADS["frequent"], HEADS["full"], HEADS["punct"])
    attach(model, plan)
    expected = decode(model, model, CompressedCache(plan), inputs, 30)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=40)
    assert_equal(decode(model, model, cache, inputs, 30), expected)


def test_a_shorter_prompt_after_reset_finds_nothing_of_the_first():
    model = build("llama")
    plan = plan_for(model, HEADS["full"], HEADS["fastgen"], HEADS["local"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS)
    decode(model, model, cache, prompts(3, 50, PADS), 20)
    cache.reset()
    assert cache.get_seq_length() == 0
    inputs = prompts(3, 20, PADS)
    expected = decode(model, model, CompressedCache(plan), inputs, 20)
    assert_equal(decode(model, model, cache, inputs, 20), expected)


@pytest.mark.parametrize("last", [(0, 4), (4, (1 << 31) - 1)])
def test_protected_spans_stay(last):
    model, inputs = build("llama"), prompts(3, 40, PADS)
    spans = [[(3, 6), (10, 14)], [last], []]
    plan = plan_for(model, HEADS["frequent"], HEADS["capped"], HEADS["sink"])
    attach(model, plan)
    expected = decode(model, model, CompressedCache(plan, protect=spans), inputs, 30)
    cache = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS, protect=spans)
    assert_equal(decode(model, model, cache, inputs, 30), expected)
    ranges = [tuple(range(*span) for span in row) for row in spans]
    assert cache.nbytes() == static_cache_bytes(plan, 3, MAX_TOKENS, spans=ranges)
    first = PADS[0]
    for positions, *_ in (held(cache)[0][0, head] for head in range(2)):
        assert {first + n for n in (*range(3, 6), *range(10, 14))} <= set(positions.tolist())


def test_a_second_turn_and_a_prompt_in_parts():
    model, inputs = build("llama"), prompts(2, 60)["input_ids"]
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"], HEADS["capped"])
    attach(model, plan)
    logits = []
    for cache in (
        CompressedCache(plan),
        StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS),
    ):
        parts = [(0, 20), (20, 37), *((n, n + 1) for n in range(37, 42)), (42, 57), (57, 58)]
        forwards = [model(input_ids=inputs[:, a:b], **as_argument(cache)) for a, b in parts]
        logits.append(torch.cat([out.logits for out in forwards], 1))
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)


def test_padding_in_a_step_leaves_its_row_alone():
    model, inputs = build("llama"), prompts(2, 30)
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=40)
    model(**inputs, **as_argument(cache))
    before = held(cache)
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], 1)
    model(input_ids=torch.full((2, 1), 6), attention_mask=mask, **as_argument(cache))
    changed = {
        row: any(
            not torch.equal(a, b)
            for old, new in zip(before, held(cache), strict=True)
            for where in old
            if where[0] == row
            for a, b in zip(old[where], new[where], strict=True)
        )
        for row in (0, 1)
    }
    assert changed == {0: True, 1: False}
    assert all(layer.fixed.row_seen.tolist() == [31, 30] for layer in cache.layers)


# ---- compiled
@pytest.mark.parametrize(
    ("make", "family", "scorer", "names"),
    [
        (build, "llama", "lift", ("fastgen", "full", "punct", "capped")),
        (one_layer, "mistral", "raw", ("frequent", "special")),
        (build, "gemma2", "mean", ("capped_fastgen", "sink", "punct_local", "full")),
    ],
)
def test_decoding_is_one_graph(make, family, scorer, names):
    model = make(family)
    plan = plan_for(model, *(HEADS[name] for name in names), scorer=scorer)
    attach(model, plan)
    long, short = prompts(3, 40, PADS), prompts(3, 23, PADS)
    cache = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS)
    with one_graph():
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = decode(model, model, CompressedCache(plan), long, 50)
        assert_equal(decode(model, step, cache, long, 50), expected)
        addresses = [t.data_ptr() for layer in cache.layers for t in layer.fixed.tensors()]
        cache.reset()
        expected = decode(model, model, CompressedCache(plan), short, 10)
        assert_equal(decode(model, step, cache, short, 10), expected)
        again = [t.data_ptr() for layer in cache.layers for t in layer.fixed.tensors()]
        assert again == addresses
        other = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS)
        assert_equal(decode(model, step, other, short, 10), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_storage(compiled):
    """Four storages beside each other; their codes are equal to the last bit."""
    model, inputs = one_layer("llama_mha"), prompts(3, 40, PADS)
    heads = [
        HeadPlan(full=True),
        HeadPlan(frequent=Budget(tokens=9), k_dtype="int8", v_dtype="int4"),
        HeadPlan(local=Budget(tokens=12), k_dtype="fp8", v_dtype="fp8"),
        HeadPlan(punct=True, k_dtype="int4", v_dtype="model"),
    ]
    plan = plan_for(model, *heads)
    attach(model, plan)
    grown = CompressedCache(plan)
    expected = decode(model, model, grown, inputs, 30)
    cache = StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS)
    with one_graph() if compiled else torch.no_grad():
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        # the growing cache may multiply codes as integers, with 16 bits of the query
        assert_equal(decode(model, step, cache, inputs, 30), expected, 1e-3)
    for where, expected_parts in held(grown)[0].items():
        for mine, theirs in zip(held(cache)[0][where], expected_parts, strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), where


# ---- generate
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"compile_config": CompileConfig(fullgraph=True, backend="aot_eager", mode=None)},
    ],
    ids=["greedy", "beams", "chunks", "compiled"],
)
def test_generate(way):
    model, inputs = one_layer("llama"), prompts(2, 30, PADS[:2])
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"], HEADS["local"])
    attach(model, plan)
    settings = {**inputs, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 2}
    plain = {k: v for k, v in way.items() if k != "compile_config"}
    expected = model.generate(**settings, **plain)
    cache = StaticCompressedCache(plan, batch=2 * way.get("num_beams", 1), max_tokens=50)
    counters.clear()
    if "compile_config" in way:
        way["compile_config"]._compile_all_devices = True
        torch._dynamo.reset()
    assert torch.equal(model.generate(**settings, **way, **as_argument(cache)), expected)
    assert counters["stats"]["unique_graphs"] == ("compile_config" in way)
    assert int(cache.get_seq_length()) == 49
    assert cache.room() == 1


# ---- bytes
# they follow from the plan and are as large as the number of heads
CONSTANTS = {"heads", "restore", "center", "scale", "capacity", "cap", "class_table", "base"}


@pytest.mark.parametrize("prompt_tokens", [None, 60])
@pytest.mark.parametrize("names", [("full",), tuple(HEADS)])
def test_bytes_equal_the_formula(names, prompt_tokens):
    model, inputs = build("gemma2"), prompts(2, 40)
    heads = [HEADS[n].model_copy(update={"k_dtype": "int8", "v_dtype": "int4"}) for n in names]
    plan = plan_for(model, *heads)
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=90, prompt_tokens=prompt_tokens)
    assert cache.nbytes() == 0
    model(**inputs, **as_argument(cache))
    expected = static_cache_bytes(plan, 2, 90, prompt_tokens)
    assert cache.nbytes() == expected
    counted = {id(t) for layer in cache.layers for t in layer.fixed.tensors()}
    for layer in cache.layers:
        for group in layer.fixed.groups:
            for owner in (layer.fixed, group, group.keys, group.values):
                for name in owner.__slots__:
                    value = getattr(owner, name)
                    if isinstance(value, torch.Tensor) and name not in CONSTANTS:
                        assert id(value) in counted, name


def test_a_plan_without_classes_costs_little_more_than_the_growing_cache():
    """Both at their largest: an index less per segment, a few counters more per row."""
    model = build("llama")
    plan = plan_for(model, HEADS["full"], HEADS["local"], HEADS["frequent"])
    grown = cache_bytes(plan, [MAX_TOKENS] * 3, [40] * 3)
    assert abs(static_cache_bytes(plan, 3, MAX_TOKENS) - grown) < 0.01 * grown


# ---- what it cannot do
def test_what_does_not_fit_is_refused_before_anything_is_overwritten():
    model, inputs = build("llama"), prompts(2, 30)
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=33, prompt_tokens=31)
    decode(model, model, cache, inputs, 2)
    before = [t.clone() for layer in cache.layers for t in layer.fixed.tensors()]
    token = {"input_ids": torch.full((2, 1), 6), **as_argument(cache)}
    with pytest.raises(KVCompressError, match="a prompt of 34 tokens.*prompt_tokens=31"):
        model(input_ids=torch.full((2, 2), 6), **as_argument(cache))
    with pytest.raises(KVCompressError, match="this batch has 3"):
        model(**prompts(3, 2), **as_argument(cache))
    model(**token)
    expected = copy.deepcopy(cache)
    with pytest.raises(KVCompressError, match="34 tokens of prompt and answer.*max_tokens=33"):
        model(**token)
    for after in (cache, expected):
        assert int(after.get_seq_length()) == 33
    same = zip(cache.layers, expected.layers, strict=True)
    assert all(
        torch.equal(a, b)
        for one, other in same
        for a, b in zip(one.fixed.tensors(), other.fixed.tensors(), strict=True)
    )
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            before, [t for layer in cache.layers for t in layer.fixed.tensors()], strict=True
        )
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda cache: cache.crop(-1), "cannot take tokens back"),
        (lambda cache: cache.activate_past_recording(), "assisted decoding"),
        (lambda cache: cache.batch_repeat_interleave(2), "has 2 rows for its life"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "has 2 rows for its life"),
        (lambda cache: cache.layers[0].offload(), "offload"),
    ],
)
def test_calls_that_are_refused(call, reason):
    cache = StaticCompressedCache(plan_for(build("llama"), HEADS["full"]), batch=2, max_tokens=9)
    with pytest.raises(KVCompressError, match=reason):
        call(cache)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"positions": "relative"}, "relative positions"),
        ("llama", {"turn_tokens": 3}, "turn quotas"),
        ("gemma3n", {}, "shared layers"),
        ("qwen3_next", {}, "linear layers"),
        ("deepseek_v3", {}, "latent layers"),
    ],
)
def test_plans_that_are_refused(family, settings, reason):
    shape = shape_of(build(family).config)
    with pytest.raises(KVCompressError, match=f"does not serve {reason}"):
        plan = uniform(shape, HEADS["local"], **settings)
        StaticCompressedCache(plan, batch=1, max_tokens=9)


def test_an_answer_that_is_too_long_is_refused():
    cache = StaticCompressedCache(plan_for(build("llama"), HEADS["full"]), batch=1, max_tokens=9)
    cache.check_length(9)
    with pytest.raises(KVCompressError, match="10 tokens of prompt and answer.*max_tokens=9"):
        cache.check_length(10)


def test_positions_beyond_the_plan_warn_once():
    model = one_layer("llama")
    plan = plan_for(model, HEADS["local"], max_position=22)
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=1, max_tokens=40)
    decode(model, model, cache, prompts(1, 20), 2)
    with pytest.warns(PositionRangeWarning, match="position 22 is beyond 21") as caught:
        for _ in range(3):
            model(input_ids=torch.full((1, 1), 6), **as_argument(cache))
    assert len(caught) == 1


def test_sizes_that_make_no_sense_are_refused():
    plan = plan_for(build("llama"), HEADS["full"])
    with pytest.raises(ValueError, match="prompt_tokens=12"):
        StaticCompressedCache(plan, batch=1, max_tokens=9, prompt_tokens=12)
    with pytest.raises(ValueError, match="2147483648"):
        StaticCompressedCache(plan, batch=1, max_tokens=1 << 31, prompt_tokens=12)


def test_a_compiled_prompt_is_refused():
    model, inputs = one_layer("llama"), prompts(1, 8)
    plan = plan_for(model, HEADS["full"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=1, max_tokens=9)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="run the prompt through the model itself first"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs, **as_argument(cache))
