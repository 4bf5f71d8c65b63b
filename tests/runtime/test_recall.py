"""The recall tier: nothing is lost, and what a step sees is what the digests choose."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from transformers import DynamicCache

from kvcompress import accounting
from kvcompress.errors import KVCompressError, PlanError
from kvcompress.plan import Budget, HeadPlan, Plan, Recall
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.layer.ready import Ready
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.recall import layer as runtime_recall
from kvcompress.runtime.recall.layer import RecallReady
from kvcompress.runtime.recall.state import RecallState
from kvcompress.runtime.static.cache import StaticCompressedCache
from kvcompress.runtime.store.state import LayerSettings
from tests.runtime import oracle, recall_oracle
from tests.runtime.battery import BAR, FULL, difference, plain_subject, plan_for
from tests.runtime.models import PAD, build, prompts
from tests.runtime.ways import WAYS, Subject, turns

PADS = [7, 1, 0]
CODED = HeadPlan(full=True, k_dtype="int8", v_dtype="int8")
MIXED = (
    CODED,
    HeadPlan(full=True, k_dtype="int8", v_dtype="int4"),
    HeadPlan(full=True, k_dtype="fp8", v_dtype="model"),
)


def recall(blocks: int, tokens: int | None = 23, **settings) -> Recall:
    """One block of 16 beside 2 sinks and 5 recent tokens stays on the device."""
    resident = {"resident": Budget(tokens=tokens)} if tokens is not None else {}
    return Recall(**{"recall_blocks": blocks, "block_tokens": 16, **resident, **settings})


def served(family="llama", *heads: HeadPlan, tier: Recall | None = None, **settings):
    model = build(family)
    plan = plan_for(model, *(heads or [FULL]), recall=tier or recall(99), **settings)
    return attach(model, plan), plan


def tiers(cache) -> list[RecallReady]:
    found = [layer.growing.ready for layer in cache.compressed_layers]
    return [tier for tier in found if isinstance(tier, RecallReady)]


def everything(cache) -> list:
    """All that a cache holds, as plain values."""
    return [(tier.progress.seen, everything_in(tier.state)) for tier in tiers(cache)]


def everything_in(state: RecallState) -> list:
    """Of one layer: slots that are in use, and the host's blocks in the order of each row."""
    found = [list(state.row_seen), list(state.budget_length)]
    size, exact = state.recall.block_tokens, state.settings.exact_tokens
    for b, seen in enumerate(state.row_seen):
        found += [t[b, :, :seen].tolist() for t in (state.exact_k, state.exact_v)]
        for group in state.groups:
            line = group.table[b]
            found.append(group.pool.data[line].tolist())
            number = torch.arange(len(line) * size, max(0, seen - exact))
            slots = number % (state.blocks.window[b] * size)
            found += [t[b][:, slots].tolist() for t in group.window.tensors()]
            found += [t[b, :, :, : len(line)].tolist() for t in group.digest_tensors()]
    return found


def places(cache) -> list:
    """Where the tokens lie, without what they are."""
    return [
        (state.row_seen, state.budget_length, state.blocks, [len(g.table[0]) for g in state.groups])
        for state in (layer.state for layer in tiers(cache))
    ]


@torch.no_grad()
def feed(model, cache, ids):
    return model(input_ids=ids, **as_argument(cache)).logits


# ---- V1: nothing is lost
@pytest.mark.parametrize(
    "way", ["beam 3", "chunks", "turns", "manual", "padded", "reset", "deepcopy", "two caches"]
)
def test_v1_ways_of_calling_when_all_blocks_come_back(way):
    ours, theirs = WAYS[way]
    model, _ = served()
    subject = Subject("llama", model, lambda: new_cache(model), CompressedCache)
    assert difference(ours(subject), theirs(plain_subject("llama"))) <= BAR


@pytest.mark.parametrize("family", ["llama_mha", "gemma2", "gpt_oss", "opt", "qwen3_next"])
def test_v1_families(family):
    model, _ = served(family, tier=recall(99, digest="mean"))
    subject = Subject(family, model, lambda: new_cache(model), CompressedCache)
    assert difference(turns(subject), turns(plain_subject(family))) <= BAR


def test_only_layers_without_a_window_have_a_tier():
    model, _ = served("gemma2")
    cache = new_cache(model)
    feed(model, cache, prompts(1, 9)["input_ids"])
    assert [type(layer.ready) for layer in cache.layers] == [Ready, RecallReady]


# ---- V2: hidden blocks equal masked ones
SCHEDULES = {
    "decode": (60, *[1] * 20),
    "turns": (40, 1, 1, 1, 18, 1, 1, 7, *[1] * 8),
    "short first": (1, 2, 1, 30, 1, 1, 20, 1, 1),
    "chunks": (20, 20, 20, 1, 1),
}


@pytest.mark.parametrize(
    ("schedule", "digest"), [*((name, "minmax") for name in SCHEDULES), ("turns", "mean")]
)
def test_v2_hidden_blocks_equal_masked_ones(schedule, digest):
    lengths = SCHEDULES[schedule]
    ids = prompts(2, sum(lengths) + 1, [5, 0] if lengths[0] > 5 else None)
    inputs = {name: t[:, : lengths[0]] for name, t in ids.items()}
    tokens = ids["input_ids"][:, lengths[0] :]
    model, plan = served(tier=recall(1, digest=digest))
    full = oracle.feed(build("llama"), DynamicCache(), inputs, tokens, lengths)
    expected, found = recall_oracle.run(build("llama"), plan, inputs, tokens, lengths)
    got = oracle.feed(model, new_cache(model), inputs, tokens, lengths)
    torch.testing.assert_close(got, expected, atol=BAR, rtol=0)
    assert found.hidden > 100
    assert float((expected - full).abs().max()) > 1e3 * BAR  # what is hidden matters
    assert len({frozenset(blocks) for blocks in found.chosen.values()}) > 2


@pytest.mark.parametrize("family", ["llama_mha", "gemma2", "gpt_oss"])
def test_v2_families_under_a_ratio_that_grows_with_the_prompt(family):
    lengths = (40, 1, 1, 40, *[1] * 6)
    ids = prompts(2, sum(lengths) + 1, [5, 0])
    inputs = {name: t[:, :40] for name, t in ids.items()}
    tier = recall(1, None, resident=Budget(ratio=0.5))
    model, plan = served(family, tier=tier)
    tokens = ids["input_ids"][:, 40:]
    expected, found = recall_oracle.run(build(family), plan, inputs, tokens, lengths)
    cache = new_cache(model)
    got = oracle.feed(model, cache, inputs, tokens, lengths)
    torch.testing.assert_close(got, expected, atol=BAR, rtol=0)
    assert found.hidden
    assert tiers(cache)[0].state.blocks.window == [2, 2]  # it was 1


# ---- V6, batches and beams
def test_v6_a_left_padded_row_equals_the_same_row_alone():
    model, _ = served("llama", tier=recall(1, None, resident=Budget(ratio=0.4)))
    inputs = prompts(3, 80, [41, 12, 0])
    together = model.generate(**inputs, max_new_tokens=25, do_sample=False, eos_token_id=None)
    for row, pad in enumerate([41, 12, 0]):
        ids = inputs["input_ids"][row : row + 1, pad:]
        alone = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, pad:], alone[0])


def test_rows_follow_repeat_select_and_reorder_and_share_the_host():
    model, _ = served("llama", CODED, tier=recall(1))
    ids = prompts(3, 80)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    alone = [new_cache(model) for _ in range(3)]
    for row, own in enumerate(alone):
        feed(model, own, ids[row : row + 1])
    before = cache.host_nbytes()
    cache.batch_repeat_interleave(2)  # 0 0 1 1 2 2
    cache.batch_select_indices(torch.tensor([5, 0, 1, 2]))  # 2 0 0 1
    cache.reorder_cache(torch.tensor([1, 0, 3, 3]))  # 0 2 1 1
    assert cache.host_nbytes() == before
    token = torch.tensor([[9], [10], [11], [12]])
    got = [feed(model, cache, token + step)[:, 0] for step in range(20)]
    for row, source in enumerate([0, 2, 1, 1]):
        own = copy.deepcopy(alone[source])
        for step, logits in enumerate(got):
            expected = feed(model, own, token[row : row + 1] + step)[0, 0]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
    pool = tiers(cache)[0].state.groups[0].pool
    assert pool.used == 3 * 4 + 4 * 1  # the prompts' blocks once, then one of each row
    cache.batch_select_indices(torch.tensor([0]))
    held = accounting.host_bytes(cache.plan, [100], [80])
    assert held <= cache.host_nbytes() <= 2 * held  # what no row names is given free


def test_a_copy_goes_its_own_way():
    model, _ = served("llama", *MIXED, tier=recall(1))
    ids = prompts(2, 80)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    held = everything(cache)
    other = copy.deepcopy(cache)
    for step in range(20):
        feed(model, other, torch.full((2, 1), 5 + step))
    assert everything(cache) == held
    assert everything(other) != held


# ---- V5: bytes
@pytest.mark.parametrize(("heads", "dtype"), [((FULL,), torch.float32), (MIXED, torch.bfloat16)])
def test_v5_bytes_equal_accounting(heads, dtype):
    model = build("llama", dtype=dtype)
    tier = recall(2, None, resident=Budget(ratio=0.3, min_tokens=20), digest="mean")
    for recall_plan in (recall(1), tier):
        plan = plan_for(model, *heads, recall=recall_plan)
        attach(model, plan)
        cache = new_cache(model)
        inputs = prompts(3, 90, [60, 12, 0])
        cache.note_forward(inputs["input_ids"], 90)
        with torch.no_grad():
            model(**inputs, **as_argument(cache))
        seen = prompt = [30, 78, 90]
        for step in range(40):
            assert cache.nbytes() == accounting.cache_bytes(plan, seen, prompt)
            assert cache.host_nbytes() == accounting.host_bytes(plan, seen, prompt)
            feed(model, cache, torch.full((3, 1), 5 + step))
            seen = [n + 1 for n in seen]
    assert accounting.kv_bytes(plan, 90, 2) == accounting.cache_bytes(plan, [90] * 2, [90] * 2)
    held = new_cache(model, compress="after_prefill")
    feed(model, held, inputs["input_ids"][:, :50])
    assert held.host_nbytes() == 0 < held.nbytes()


def test_a_byte_budget_becomes_a_resident_part():
    model = build("llama", dtype=torch.bfloat16)
    plan = plan_for(model, CODED, recall=recall(2))
    full = plan.model.bf16_kv_bytes(4000, 2)

    def needed(found: Plan) -> int:
        return accounting.kv_bytes(found, 4000, 2) + accounting.recalled_bytes(found, 4000, 2)

    for target in (full // 8, full // 6, full // 4, full // 3, full // 2, full):
        found = accounting.recall_within(plan, target, 4000, 2)
        assert needed(found) <= target
        tokens = found.recall.resident.tokens
        for extra in range(16, 16 * 20, 16):  # nothing larger would fit
            bigger = found.recall.model_copy(update={"resident": Budget(tokens=tokens + extra)})
            more = needed(plan.model_copy(update={"recall": bigger}))
            assert more > target or tokens + extra >= 4000
    least = needed(plan_for(model, CODED, recall=recall(2)))
    with pytest.raises(PlanError, match=f"smallest needs {least}"):
        accounting.recall_within(plan, least - 1, 4000, 2)
    with pytest.raises(PlanError, match="no recall tier"):
        accounting.recall_within(plan_for(model, CODED), full, 4000, 2)


# ---- V7, V8: drafts and chunks
def looping_prompt() -> dict[str, torch.Tensor]:
    """A prompt in which prompt lookup finds drafts, and rejects most of them."""
    ids = prompts(1, 20)["input_ids"]
    ids = torch.cat([ids, ids, ids[:, :9]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("family", "heads"), [("llama", MIXED), ("gemma2", (FULL,))])
def test_v7_drafting_changes_no_token(family, heads):
    model, _ = served(family, *heads, tier=recall(1))
    inputs = looping_prompt()
    # a generated pad would make the assistant hide it
    options = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [PAD]}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=5, **options), plain)
    near, far = build(family), build(family, seed=5)
    with torch.no_grad():
        for a, b in zip(near.parameters(), far.parameters(), strict=True):
            a.lerp_(b, 0.02)
    attach(near, plan_for(near, *heads, recall=recall(1)))
    assert torch.equal(model.generate(**inputs, assistant_model=near, **options), plain)


@pytest.mark.parametrize("prompt", [1, 72])
def test_v7_a_cropped_draft_leaves_the_state_as_it_was(prompt):
    model, _ = served("llama", *MIXED, tier=recall(1))
    ids, draft = prompts(1, prompt)["input_ids"], prompts(3, 40)["input_ids"][2:]
    cache = new_cache(model)
    feed(model, cache, ids)
    cache.activate_past_recording()
    before = everything(cache)
    feed(model, cache, draft)
    assert everything(cache) != before
    assert cache.nbytes() > accounting.cache_bytes(cache.plan, [prompt + 40], [prompt])
    with pytest.raises(KVCompressError, match="call crop first"):
        cache.reorder_cache(torch.tensor([0]))
    cache.crop(-40)
    assert everything(cache) == before
    assert cache.nbytes() == accounting.cache_bytes(cache.plan, [prompt], [prompt])
    feed(model, cache, draft)
    cache.crop(-3)
    again = new_cache(model)
    feed(model, again, ids)
    for token in draft[0, :37]:
        feed(model, again, token.view(1, 1))
    assert places(cache) == places(again)
    token = torch.tensor([[8]])
    expected, got = feed(model, again, token), feed(model, cache, token)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # a code may round the other way
    cache.crop(0)
    with pytest.raises(KVCompressError, match="only the 0 newest"):
        cache.crop(-1)


def test_a_long_draft_is_settled_from_its_oldest_token_on(monkeypatch):
    monkeypatch.setattr(runtime_recall, "_MOST_DRAFTED", 30)
    model, _ = served("llama", *MIXED, tier=recall(1))
    ids = prompts(1, 90)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids[:, :40])
    cache.activate_past_recording()
    feed(model, cache, ids[:, 40:])
    with pytest.raises(KVCompressError, match="only the 30 newest"):
        cache.crop(-31)
    cache.crop(-30)
    assert cache.get_seq_length() == 60
    again = new_cache(model)
    for part in (ids[:, :40], *ids[:, 40:60].split(1, 1)):
        feed(model, again, part)
    assert places(cache) == places(again)
    token = torch.tensor([[8]])
    expected, got = feed(model, again, token), feed(model, cache, token)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("ratio", [False, True])
def test_v8_where_a_token_lies_does_not_depend_on_how_it_came(ratio):
    """The same keys in parts, one by one, and with a detour over other rows: bit for bit."""
    model = build("llama", dtype=torch.bfloat16)
    tier = recall(1, None, resident=Budget(ratio=0.5)) if ratio else recall(1, 60)
    settings = LayerSettings(plan_for(model, *MIXED, recall=tier), None, 0)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 2, 170, 16, generator=generator).bfloat16() for _ in range(2))
    valid = torch.ones(3, 170, dtype=torch.bool)
    valid[0, :41] = valid[1, :2] = False
    held = []
    for cuts in ([170], [50, 60, 60], [*range(2, 18), 18], [60, *[1] * 110]):
        state, low = RecallState.empty(settings, key, value), 0
        for cut in cuts:
            part = slice(low, low + cut)
            here = None if bool(valid[:, part].all()) else valid[:, part]
            prompt = ratio or cut > 1
            state.take_in(key[:, :, part], value[:, :, part], here, prompt)
            if low == 50:
                state.select_rows([2, 0, 1, 1])
                state.select_rows([1, 2, 0])
            low += cut
        assert low == 170
        if not ratio:
            state.budget_length = []  # one row of tokens at a time does not end a prompt
        held.append(everything_in(state))
    for other in held[1:]:
        assert other == held[0]
    assert [len(line) for line in state.groups[0].table] == state.blocks.host
    assert max(state.blocks.host) > min(state.blocks.host) > 0


@pytest.mark.parametrize("size", [31])
def test_v8_a_held_prompt_equals_one_that_came_at_once(size):
    model, _ = served("llama", *MIXED, tier=recall(1))
    inputs = prompts(3, 80, PADS)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    cache = new_cache(model, compress="after_prefill")
    got = model.generate(**inputs, **options, **as_argument(cache), prefill_chunk_size=size)
    assert torch.equal(got, expected)


# ---- codes
def test_codes_and_key_constants_stay_near_the_full_cache():
    model = build("llama")
    ids = prompts(2, 80)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -20:]
    shape = shape_of(model.config)
    generator = torch.Generator().manual_seed(0)
    size = (shape.kv_heads, shape.head_dim)
    params = KVParams(
        tuple(torch.randn(size, generator=generator) for _ in range(shape.layers)),
        tuple(torch.rand(size, generator=generator) + 0.5 for _ in range(shape.layers)),
    )
    errors = {}
    for dtype in ("model", "int8", "int4"):
        head = HeadPlan(full=True, k_dtype=dtype, v_dtype=dtype)
        attach(model, plan_for(model, head, recall=recall(99)), params)
        cache = new_cache(model)
        feed(model, cache, ids[:, :60])
        got = torch.cat([feed(model, cache, token) for token in ids[:, 60:].split(1, 1)], 1)
        errors[dtype] = float((got - expected).abs().mean())
    assert errors["model"] < 1e-5 < errors["int8"] < 0.02 < errors["int4"] < 0.5


def test_only_chosen_blocks_are_copied():
    model, plan = served("llama", CODED, tier=recall(2))
    cache = new_cache(model)
    feed(model, cache, prompts(1, 94)["input_ids"])  # 87 coded tokens: 6 blocks, 5 on the host
    assert all(layer.copied_bytes() == 0 for layer in tiers(cache))
    feed(model, cache, torch.tensor([[7]]))
    block = accounting.recall_block_bytes(plan, CODED)
    for layer in tiers(cache):
        assert layer.copied_bytes() == 2 * block * len(plan.heads[0])
    assert accounting.recalled_bytes(plan, 94, 1) == 2 * block * len(plan.heads[0])


# ---- refusals
def test_what_does_not_go_with_a_recall_tier_is_refused():
    model, plan = served()
    with pytest.raises(KVCompressError, match="protect has no meaning"):
        new_cache(model, protect=[(0, 4)])
    with pytest.raises(KVCompressError, match="does not serve a recall tier"):
        StaticCompressedCache(plan, batch=1, max_tokens=64)
    for changes, words in (
        ({"heads": plan_for(model, HeadPlan()).heads}, "heads that are not full"),
        ({"positions": "relative"}, "relative positions"),
        ({"turn_tokens": 4}, "turn_tokens"),
    ):
        data = {**plan.model_dump(), **changes}
        with pytest.raises(ValidationError, match=words):
            Plan.model_validate(data)
    for family, words in (("deepseek_v3", "latent layers"), ("gemma3n", "layers that share keys")):
        other = plan_for(build(family), FULL)
        with pytest.raises(ValidationError, match=words):
            Plan.model_validate({**other.model_dump(), "recall": recall(1)})
    with pytest.raises(ValidationError, match="multiple of 16"):
        recall(1, block_tokens=24)


def test_a_recall_cache_is_not_saved(tmp_path):
    model, _ = served()
    cache = new_cache(model)
    feed(model, cache, prompts(1, 40)["input_ids"])
    with pytest.raises(KVCompressError, match="a recall tier cannot be saved yet"):
        cache.save(tmp_path / "cache")
