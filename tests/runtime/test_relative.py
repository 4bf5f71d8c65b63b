"""Cache-relative positions against plain transformers and a slow oracle on un-rotated keys (V3)."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from kvcompress import accounting
from kvcompress.demo.run import MODEL
from kvcompress.errors import (
    KVCompressError,
    PlanError,
    PositionRangeWarning,
    UnsupportedModelError,
)
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.layer import relative
from kvcompress.runtime.layer.relative import (
    check_relative,
    frame_positions,
    most_kept,
    parts,
    row_starts,
)
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument, cache_of
from tests.runtime.models import CONFIGS, PAD, VOCAB, build

EXACT = {"k_dtype": "model", "v_dtype": "model"}
SINK = HeadPlan(**EXACT)
LOCAL = HeadPlan(local=Budget(tokens=12), **EXACT)
FREQUENT = HeadPlan(frequent=Budget(tokens=9), **EXACT)
MIXED = HeadPlan(
    special=True,
    punct=True,
    frequent=Budget(ratio=0.2, max_tokens=8),
    local=Budget(tokens=10),
    cap=20,
    **EXACT,
)
# float32 against float64 or another order of sums; weights are sharpened, so logits reach 10
TOLERANCE = 1e-5


def one_layer(kv_heads):
    def config():
        changed = CONFIGS["llama"]()
        changed.num_hidden_layers, changed.num_key_value_heads = 1, kv_heads
        return changed

    with mock.patch.dict(CONFIGS, one_layer=config):
        return build("one_layer")


def relative_plan(model, *heads, max_position=64, **settings):
    """The heads in turn, over the model's heads and layers."""
    shape = shape_of(model.config, model.dtype)
    settings = {
        "sink_tokens": 2,
        "recent_tokens": 5,
        "punct_ids": tuple(range(5, 13)),
        "special_ids": (30, 31, 32, 33),
        "positions": "relative",
        **settings,
    }
    plan = uniform(shape, heads[0], max_position=max_position, **settings)
    rows = tuple(
        tuple(heads[(layer + h) % len(heads)] for h in range(shape.kv_heads))
        for layer in range(shape.layers)
    )
    return plan.model_copy(update={"heads": rows})


def tokens(batch, length, pads=()):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = PAD, 0
    return ids, mask


@torch.no_grad()
def step(model, cache, ids, mask, low, high):
    """Logits ``[B, T, vocab]`` of one forward."""
    return model(
        input_ids=ids[:, low:high], attention_mask=mask[:, :high], **as_argument(cache)
    ).logits


def stored_scores(cache):
    """``{(layer, row, head): {position: score}}`` of what is stored; 0 where nothing is ranked."""
    found = {}
    for layer, state in enumerate(own.state for own in cache.compressed_layers):
        if state is None:
            continue
        for group in state.groups:
            for b in range(state.batch):
                for i, h in enumerate(group.heads):
                    line = found.setdefault((layer, b, h), {})
                    recent = range(state.settings.sink_tokens, state.settings.exact_tokens)
                    for slot, p in enumerate(state.exact_position[b].tolist()):
                        ranked = slot in recent and group.recent_score is not None
                        at = slot - recent.start
                        line[p] = float(group.recent_score[b, i, at]) if ranked else 0.0
            for bucket in group.store.buckets():
                for s, (b, i) in enumerate(zip(bucket.batch, bucket.head, strict=True)):
                    line = found[layer, int(b), group.heads[int(i)]]
                    score = torch.zeros(bucket.capacity)
                    score = score if bucket.score is None else bucket.score[s]
                    line |= dict(zip(bucket.position[s].tolist(), score.tolist(), strict=True))
            for line in found.values():
                line.pop(-1, None)
    return found


# ---- one layer: a fresh encode of the kept tokens
@pytest.mark.parametrize("kv_heads, head", [(2, LOCAL), (1, FREQUENT), (1, MIXED)])
def test_v3_a_stream_equals_a_fresh_encode_of_what_is_kept(kv_heads, head):
    plain, model = one_layer(kv_heads), one_layer(kv_heads)
    plan = relative_plan(model, head)
    ids, mask = tokens(1, 300)
    attach(model, plan)
    cache = CompressedCache(plan)
    step(model, cache, ids, mask, 0, 40)
    dropped = 0
    for now in range(40, 300):
        (kept, *others) = (sorted(line) for line in stored_scores(cache).values())
        assert all(other == kept for other in others)
        got = step(model, cache, ids, mask, now, now + 1)[0, 0]
        with torch.no_grad():
            fresh = plain(input_ids=ids[:, [*kept, now]], use_cache=False).logits[0, -1]
        torch.testing.assert_close(got, fresh, atol=TOLERANCE, rtol=0)
        dropped += len(kept) < now
    assert dropped == 260


# ---- many layers and ragged heads: the definition, on keys that were never rotated
class Oracle:
    """The model run with all position ids 0, so that its attention sees un-rotated vectors."""

    NAME = "kvcompress_relative_oracle"

    def __init__(self, model, plan, mask):
        self.model, self.plan, self.mask = model, plan, mask.bool()
        self.seen = {}
        self.history = {}
        self.kept = {}
        self.sums = {}
        AttentionInterface.register(self.NAME, self.attention)
        AttentionMaskInterface.register(self.NAME, lambda *a, **k: None)
        model.set_attn_implementation(self.NAME)

    @torch.no_grad()
    def step(self, ids, kept):
        """Logits of the next tokens, when each (layer, row, head) still holds `kept`."""
        self.kept = kept
        zeros = torch.zeros_like(ids)
        return self.model(input_ids=ids, position_ids=zeros, use_cache=False).logits

    def rotated(self, module, vectors):
        """Row i of ``[N, D]`` rotated by the model's own code to position i, float64."""
        nope = {"cohere2": lambda m: m.sliding_window is None, "smollm3": lambda m: not m.use_rope}
        if nope.get(self.model.config.model_type, lambda m: False)(module):
            return vectors.double()
        place = torch.arange(len(vectors))[None]
        cos, sin = self.model.base_model.rotary_emb(vectors.float(), place)
        apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
        wide = vectors.double()[None, None]
        return apply(wide, wide, cos.double(), sin.double())[0][0, 0].double()

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer, length = module.layer_idx, query.shape[2]
        before = self.seen.get(layer, 0)
        if before:
            old = self.history[layer]
            key, value = torch.cat([old[0], key], 2), torch.cat([old[1], value], 2)
        self.history[layer], self.seen[layer] = (key, value), before + length
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        heads = key.shape[1]
        groups = query.shape[1] // heads
        for b in range(key.shape[0]):
            new = [p for p in range(before, before + length) if self.mask[b, p]]
            for h in range(heads):
                kept = [*sorted(self.kept.get((layer, b, h), [])), *new]
                sums = self.sums.setdefault((layer, b, h), {})
                keys = self.rotated(module, key[b, h, kept])
                for g in range(h * groups, (h + 1) * groups):
                    placed = query[b, g, [p - before for p in new]]
                    pad = torch.zeros(len(kept) - len(new), placed.shape[-1])
                    queries = self.rotated(module, torch.cat([pad, placed]))[len(pad) :]
                    for q, now in zip(queries, new, strict=True):
                        seen = [i for i, p in enumerate(kept) if self._sees(layer, now, p)]
                        mass = (keys[seen] @ q * scaling).softmax(-1)
                        out[b, g, now - before] = mass @ value[b, h, kept][seen].double()
                        for i, m in zip(seen, mass.tolist(), strict=True):
                            sums[kept[i]] = sums.get(kept[i], 0.0) + m / groups
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def _sees(self, layer, now, position):
        window = self.plan.model.sliding_windows[layer]
        return position <= now and (window is None or position > now - window)


def lockstep(family, heads, edges, hidden=range(0), params=None, **settings):
    """Largest difference of logits from the oracle over forwards cut at `edges`, and the cache.

    Row 0 has 3 pads, and tokens `hidden` by its mask.
    """
    model, exact = build(family), build(family)
    plan = relative_plan(model, *heads, scorer="raw", max_position=48, **settings)
    ids, mask = tokens(2, edges[-1], pads=(3, 0))
    mask[0, list(hidden)] = 0
    oracle = Oracle(exact, plan, mask)
    attach(model, plan, params)
    cache = CompressedCache(plan, params)
    worst = 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        kept = stored_scores(cache)
        got = step(model, cache, ids, mask, low, high)
        expected = oracle.step(ids[:, low:high], kept)
        real = mask[:, low:high].bool()
        worst = max(worst, float((got - expected)[real].abs().max()))
    return worst, cache, oracle


EDGES = [0, 20, *range(21, 40), 52, *range(53, 75)]


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt_neox", "glm4", "cohere2", "mistral", "smollm3"]
)
def test_v3_ragged_heads_equal_the_definition(family):
    heads = [LOCAL, FREQUENT, SINK, MIXED]
    worst, cache, _ = lockstep(family, heads, EDGES)
    assert worst < TOLERANCE
    sizes = {len(line) for line in stored_scores(cache).values()}
    assert len(sizes) > 1 and max(sizes) < 48 < 74  # frames stopped, ranks did not reach them


def test_v3_key_constants_and_tiles_change_nothing(monkeypatch):
    monkeypatch.setattr(relative, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(relative, "LEAST_TILE_TOKENS", 3)
    torch.manual_seed(0)
    params = KVParams(
        tuple(torch.randn(2, 16) for _ in range(2)),
        tuple(torch.rand(2, 16) + 0.5 for _ in range(2)),
    )
    worst, _, _ = lockstep("llama", [LOCAL, FREQUENT], EDGES, params=params)
    assert worst < TOLERANCE


def test_v3_hidden_tokens_take_no_number():
    worst, _, _ = lockstep("llama", [LOCAL, FREQUENT], EDGES, hidden=range(43, 47))
    assert worst < TOLERANCE


def test_v3_votes_are_those_of_the_numbered_attention():
    _, cache, oracle = lockstep("llama", [FREQUENT], EDGES)
    ranked = 0
    for where, line in stored_scores(cache).items():
        for position, score in line.items():
            if score:
                assert score == pytest.approx(oracle.sums[where][position], abs=1e-4)
                ranked += 1
    assert ranked > 40


@pytest.mark.parametrize("dtype, bound", [("int8", 0.1), ("int4", 1.5)])
def test_v3_codes_are_turned_after_they_are_widened(dtype, bound):
    """Within the error of the codes: a step of int8 is 1/255 of a key's range, of int4 1/15."""
    coded = [h.model_copy(update={"k_dtype": dtype, "v_dtype": dtype}) for h in (LOCAL, FREQUENT)]
    worst, _, _ = lockstep("llama", coded, EDGES)
    assert TOLERANCE < worst < bound


# ---- range
def test_v3_positions_never_leave_the_range():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, MIXED, max_position=64)
    ids, mask = tokens(2, 500, pads=(90, 0))
    largest = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: largest.append(int(kwargs["position_ids"].max())),
        with_kwargs=True,
    )
    attach(model, plan)
    largest.clear()
    cache = CompressedCache(plan)
    for low, high in ((0, 200), (200, 201), (201, 440), *((n, n + 1) for n in range(440, 500))):
        logits = step(model, cache, ids, mask, low, high)
        assert logits.isfinite().all()
    assert max(largest) == 63
    assert cache.get_seq_length() == 500
    assert max(map(len, stored_scores(cache).values())) <= most_kept(plan) < 64


def test_generate_equals_a_loop_of_forwards():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, max_position=64)
    ids, mask = tokens(2, 100, pads=(7, 0))
    attach(model, plan)
    cache, low = CompressedCache(plan), 0
    for _ in range(12):
        newest = step(model, cache, ids, mask, low, ids.shape[1])[:, -1].argmax(-1, keepdim=True)
        low, ids = ids.shape[1], torch.cat([ids, newest], 1)
        mask = torch.cat([mask, torch.ones_like(newest)], 1)
    out = model.generate(
        ids[:, :100],
        attention_mask=mask[:, :100],
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, ids)
    expected = accounting.cache_bytes(plan, [111 - 7, 111], [93, 100])
    assert cache_of(out).nbytes() == cache.nbytes() == expected


def test_drafts_leave_no_trace_beyond_the_range():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, max_position=64)
    ids = torch.cat([tokens(1, 30)[0]] * 3, 1)  # repeats itself, so that drafts are found
    attach(model, plan)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    got = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(got, plain)
    assert sum(length > 1 for length in lengths[1:]) > 3


def test_rows_can_be_reordered():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, max_position=64)
    ids, mask = tokens(2, 100, pads=(7, 0))
    attach(model, plan)
    kept, swapped = CompressedCache(plan), CompressedCache(plan)
    for cache in (kept, swapped):
        step(model, cache, ids, mask, 0, 90)
    swapped.reorder_cache(torch.tensor([1, 0]))
    for now in range(90, 100):
        expected = step(model, kept, ids, mask, now, now + 1)
        got = step(model, swapped, ids.flip(0), mask.flip(0), now, now + 1)
        torch.testing.assert_close(got.flip(0), expected, atol=TOLERANCE, rtol=0)


def test_parts_leave_room_for_what_is_kept():
    plan = relative_plan(build("llama"), LOCAL, max_position=64)
    assert most_kept(plan) == 14
    assert parts(plan, 0, 64) == [(0, 64)]
    assert parts(plan, 1, 50) == [(0, 50)]
    assert parts(plan, 1, 51) == parts(plan, 0, 65)[:1] + [(50, 51)] == [(0, 50), (50, 51)]
    wide = plan.model_copy(update={"max_position": 4096})
    assert parts(wide, 0, 4096) == [(0, 4096)]
    assert [high - low for low, high in parts(wide, 0, 4097)] == [512] * 8 + [1]


@pytest.mark.parametrize("length", [100, 97])
def test_a_long_chunk_equals_its_parts(length):
    """Rows padded for longer than a part, and a last part of one token, included."""
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, max_position=48, score_rows=11)
    ids, mask = tokens(2, length + 8, pads=(37, 0))
    cuts = parts(plan, 0, length)
    assert cuts[0] == (0, 32) and len(cuts) == 4  # 48 positions less 16 kept tokens
    attach(model, plan)
    whole, split = CompressedCache(plan), CompressedCache(plan)
    got = step(model, whole, ids, mask, 0, length)
    expected = torch.cat([step(model, split, ids, mask, *cut) for cut in cuts], 1)
    real = mask[:, :length].bool()
    torch.testing.assert_close(got[real], expected[real], atol=TOLERANCE, rtol=0)
    assert stored_scores(whole).keys() == stored_scores(split).keys()
    for where, line in stored_scores(whole).items():
        assert line == pytest.approx(stored_scores(split)[where], abs=1e-3)
    for now in range(length, length + 8):
        got, expected = (step(model, c, ids, mask, now, now + 1) for c in (whole, split))
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    settings = {"max_new_tokens": 12, "do_sample": False}
    inputs = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
    chunked = model.generate(**inputs, **settings, prefill_chunk_size=32)
    assert torch.equal(model.generate(**inputs, **settings), chunked)


def test_a_padded_row_equals_the_same_row_alone():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, MIXED, max_position=64)
    ids, mask = tokens(2, 70, pads=(13, 0))
    attach(model, plan)
    both, alone = CompressedCache(plan), CompressedCache(plan)
    edges = [0, 40, *range(41, 56), 63, *range(64, 71)]
    for low, high in zip(edges, edges[1:], strict=False):
        together = step(model, both, ids, mask, low, high)[0, max(0, 13 - low) :]
        single = step(model, alone, ids[:1, 13:], mask[:1, 13:], max(0, low - 13), high - 13)[0]
        torch.testing.assert_close(together, single, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama4", "qwen3_next"])
def test_uncompressed_it_is_the_model_itself(family):
    """Tokens that the mask hides take no number: the keys behind them are turned back by them."""
    plain, model = build(family), build(family)
    everything = HeadPlan(local=Budget(tokens=90), **EXACT)
    plan = relative_plan(model, everything, max_position=128)
    ids, mask = tokens(2, 80, pads=(5, 0))
    mask[1, 20:27] = 0
    attach(model, plan)
    cache = new_cache(model)
    got = [step(model, cache, ids, mask, a, b) for a, b in ((0, 50), (50, 51), (51, 80))]
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        expected = plain(input_ids=ids, attention_mask=mask, position_ids=places).logits
    real = mask.bool()
    # linear attention sums a prompt in another order when it comes in parts
    limit = 10 * TOLERANCE if family == "qwen3_next" else TOLERANCE
    torch.testing.assert_close(torch.cat(got, 1)[real], expected[real], atol=limit, rtol=0)


def test_16_bit_models():
    model = build("llama").bfloat16()
    plan = relative_plan(model, HeadPlan(local=Budget(tokens=12)), max_position=48)
    ids, mask = tokens(1, 120)
    attach(model, plan)
    cache = CompressedCache(plan)
    logits = [step(model, cache, ids, mask, a, b) for a, b in ((0, 100), (100, 101), (101, 120))]
    assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in logits)


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_cpu():
    plan = relative_plan(build("llama"), LOCAL, FREQUENT, MIXED, max_position=64)
    ids, mask = tokens(2, 110, pads=(7, 0))
    found = []
    for device in ("cpu", "cuda"):
        model = attach(build("llama").to(device), plan)
        cache, place = CompressedCache(plan), (ids.to(device), mask.to(device))
        cuts = ((0, 100), *((n, n + 1) for n in range(100, 110)))
        found.append(torch.cat([step(model, cache, *place, *cut).cpu() for cut in cuts], 1))
    # float32 without TF32: sums in another order
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], atol=5e-5, rtol=0)


# ---- where the frames come from
def test_frames_count_from_the_first_real_token_and_stop():
    plan = relative_plan(build("llama"), LOCAL, max_position=40)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    start = row_starts(None, mask, 0, 2)
    assert frame_positions(plan, start, 0, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert row_starts(torch.tensor([2, -1], dtype=torch.int32), None, 5, 2).tolist() == [2, 5]
    known = torch.tensor([2, 0], dtype=torch.int32)
    later = frame_positions(plan, row_starts(known, None, 40, 2), 40, 3)
    assert later.tolist() == [[38, 39, 39], [39, 39, 39]]


def test_given_positions_do_not_matter():
    model = build("llama")
    plan = relative_plan(model, LOCAL, FREQUENT, max_position=48)
    ids, mask = tokens(2, 30, pads=(3, 0))
    attach(model, plan)
    outputs = []
    for places in (None, torch.arange(30)[None] + 7):
        cache = CompressedCache(plan)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=places, **as_argument(cache))
        outputs.append(out.logits)
    assert torch.equal(*outputs)


# ---- refusals
@pytest.mark.parametrize(
    "head, settings, message",
    [
        (HeadPlan(full=True), {}, r"layer 0, head 0 \(full\) keeps more tokens the longer"),
        (HeadPlan(punct=True), {}, "a cap to a head that keeps special tokens or punctuation"),
        (HeadPlan(frequent=Budget(ratio=0.1)), {}, "budgets in tokens or with max_tokens"),
        (HeadPlan(local=Budget(tokens=60)), {}, r"up to 62 tokens.*5 new.*max_position 64"),
        (HeadPlan(cap=60, punct=True, local=Budget(tokens=8)), {}, r"up to 67 tokens"),
        (LOCAL, {"max_position": 18}, r"up to 14 tokens.*keep at most 13"),
    ],
)
def test_plans_that_outgrow_the_range_are_refused(head, settings, message):
    model = build("llama")
    with pytest.raises(PlanError, match=message):
        attach(model, relative_plan(model, head, **settings))


def test_protected_spans_count():
    plan = relative_plan(build("llama"), LOCAL, max_position=64)
    assert most_kept(plan, 20) == 2 + 5 + 7 + 20
    check_relative(plan, 45)
    with pytest.raises(PlanError, match="up to 60 tokens"):
        check_relative(plan, 46)
    with pytest.raises(PlanError, match="up to 64 tokens"):
        CompressedCache(plan, protect=[(0, 20), (30, 60)])


def test_windowed_layers_are_bounded_by_their_window():
    plan = relative_plan(build("mistral"), HeadPlan(full=True), max_position=64)
    assert most_kept(plan) == 24  # the window, without sinks


@pytest.mark.parametrize(
    "kinds, kind", [(("latent", "full"), "latent"), (("full", "shared"), "shared")]
)
def test_layers_whose_keys_cannot_be_turned_are_refused(kinds, kind):
    plan = relative_plan(build("llama"), LOCAL)
    shape = plan.model.model_copy(update={"layer_kinds": kinds})
    with pytest.raises(PlanError, match=f"is a {kind} layer"):
        check_relative(plan.model_copy(update={"model": shape}))


@pytest.mark.parametrize(
    "family, reason",
    [("opt", "in layer 0 the model has no rotary embedding"), ("stretched", "explains the keys")],
)
def test_models_that_do_not_rotate_are_refused(family, reason):
    model = build("llama" if family == "stretched" else family)
    if family == "stretched":
        forward = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda x, position_ids: forward(x, position_ids * 3)
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model, relative_plan(model, LOCAL))


def test_a_cache_that_the_attached_plan_does_not_foresee_is_refused():
    model = build("llama")
    plan = relative_plan(model, LOCAL)
    attach(model, plan.model_copy(update={"positions": "original"}))
    with pytest.raises(PlanError, match=r"attach\(model, cache.plan\)"):
        step(model, CompressedCache(plan), *tokens(1, 9), 0, 9)
    with pytest.raises(KVCompressError, match="per_chunk"):
        CompressedCache(plan, compress="after_prefill")


# ---- the trained model
def stream_losses(model, cache, ids, width=64):
    """Loss in nats of every token but the first, fed `width` at a time."""
    losses = []
    with torch.no_grad():
        for low in range(0, ids.shape[1] - 1, width):
            part = ids[:, low : min(low + width, ids.shape[1] - 1)]
            logits = model(input_ids=part, **as_argument(cache)).logits[0]
            target = ids[0, low + 1 : low + 1 + part.shape[1]]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def windowed_losses(model, ids, length=1024, step=512):
    """The same, each token after the first window with 512 to 1023 tokens before it, in range."""
    losses = []
    for low in range(0, ids.shape[1] - step, step):
        part = ids[:, low : low + length]
        logits = model(input_ids=part, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none")
        losses.append(loss if low == 0 else loss[step - 1 :])
    return torch.cat(losses)


def test_v3_a_trained_model_reads_on_beyond_its_length():
    """3000 tokens of held-out text through a model that was trained on 1024."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (MODEL / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:12000], add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([ids[:3000]])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    far = slice(2048, None)
    in_range = float(windowed_losses(model, ids)[far].mean())
    dense = float(stream_losses(model, DynamicCache(), ids)[far].mean())
    head = HeadPlan(local=Budget(tokens=512), frequent=Budget(tokens=128))
    plan = uniform(shape_of(model.config), head, recent_tokens=16, positions="relative")
    attach(model, plan)
    relative = float(stream_losses(model, CompressedCache(plan), ids)[far].mean())
    plan = plan.model_copy(update={"positions": "original"})
    attach(model, plan)
    with pytest.warns(PositionRangeWarning):
        original = float(stream_losses(model, CompressedCache(plan), ids)[far].mean())
    detach(model)
    assert relative < in_range + 0.05, (relative, in_range)
    assert original > in_range + 0.5, (original, in_range)
    assert dense > in_range + 2.0, (dense, in_range)
