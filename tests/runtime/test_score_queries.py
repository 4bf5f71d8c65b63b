"""Votes of a first prompt: one pass, the last rows, estimates; against the float32 path and the
oracle, and the profile's against the runtime's."""

from __future__ import annotations

import pytest
import torch

from kvcompress.errors import KVCompressError
from kvcompress.evict.score_queries import pair_weight
from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile.collect import forward, watching_rows
from kvcompress.recipe import Keep
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.rotation import find_rotations
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.prompt import score_queries as score_queries
from kvcompress.runtime.prompt.score_queries import LateScoreQueries, attend_prompt
from kvcompress.runtime.store.attend import attend
from tests.runtime import oracle
from tests.runtime.battery import EXACT, plan_for
from tests.runtime.models import build, prompts
from tests.runtime.test_parity import KEEP_SETS

SCORED = [KEEP_SETS["frequent"], KEEP_SETS["fastgen"]]
ESTIMATED = {"score_rows": 5, "score_stride": 4}
FAMILIES = ["llama", "mistral", "gemma2", "llama4", "gpt_oss", "gemma3n"]


@pytest.fixture
def seen(monkeypatch):
    """The (state, chunk, scores, output) of every first prompt that was attended."""
    found = []
    real = attend_prompt

    def spy(state, chunk, scores, fast_attention, late):
        out = real(state, chunk, scores, fast_attention, late)
        found.append((state, chunk, {n: s.clone() for n, s in scores.items()}, out))
        return out

    monkeypatch.setattr("kvcompress.runtime.layer.attention.attend_prompt", spy)
    return found


@torch.no_grad()
def feed(model, cache, inputs):
    return model(**inputs, **as_argument(cache), use_cache=True).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scorer", ["raw", "lift"])
@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("family", FAMILIES[:-1])  # layers that share keys are voted on twice
def test_one_pass_equals_the_chunked_float32_path(family, rows, scorer, dtype, seen):
    model, inputs = build(family, dtype=dtype), prompts(2, 60, [7, 0])
    attach(model, plan_for(model, *SCORED, scorer=scorer, score_rows=rows))
    feed(model, new_cache(model), inputs)
    assert seen
    for state, chunk, scores, out in seen:
        state.row_seen = [0] * state.batch  # as before the prompt
        expected = {n: torch.zeros_like(s) for n, s in scores.items()}
        first = max(0, chunk.length - (rows or chunk.length))
        state.first_vote = first
        reference = attend(_empty(state, chunk), chunk, expected).transpose(1, 2)
        scale = 60 if scorer == "lift" else 1
        for number, score in scores.items():
            torch.testing.assert_close(score, expected[number], rtol=1e-5, atol=1e-5 * scale)
        # an output in bf16 comes from the model's own kernel, which rounds attention to bf16
        close = 1e-5 if dtype == torch.float32 else 2e-2
        real = slice(7, None)  # padding attends to nothing or to itself
        torch.testing.assert_close(out[:, real], reference[:, real], rtol=close, atol=close)


def _empty(state, chunk):
    from kvcompress.runtime.store.state import LayerState

    fresh = LayerState.empty(state.settings, chunk.key, chunk.value, [()] * state.batch)
    fresh.first_vote = state.first_vote
    return fresh


@pytest.mark.parametrize(
    "schedule", [[48, 6, 1, 1, 1], [20, 28, 1, 1, 1], [48, 1, 1, 5, 1, 1], [3, 45, 1, 1]]
)
@pytest.mark.parametrize("pads", [None, [7, 1]])
def test_parts_and_later_prompts_vote_with_all_rows(schedule, pads):
    """The first prompt, or its first part, has its sums estimated; what follows adds to them."""
    model, inputs = build("llama"), prompts(2, 48, pads)
    plan = plan_for(model, *SCORED, **ESTIMATED)
    tokens = prompts(2, 60)["input_ids"][:, 48:]
    inputs = {name: value[:, : schedule[0]] for name, value in inputs.items()}
    tokens = torch.cat([prompts(2, 48)["input_ids"][:, schedule[0] :], tokens], 1)
    expected, dropped = oracle.run(model, plan, inputs, tokens, schedule=schedule)
    attach(model, plan)
    got = oracle.feed(model, CompressedCache(plan), inputs, tokens, schedule)
    detach(model)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert dropped > 0


@pytest.mark.parametrize("family", [*FAMILIES, "llama_mha"])
@pytest.mark.parametrize("size", [1, 9, 50])
def test_a_held_prompt_has_the_estimates_of_one_that_came_at_once(family, size):
    model, inputs = build(family), prompts(2, 60, [7, 0])
    attach(model, plan_for(model, *SCORED, **ESTIMATED))
    whole, held = new_cache(model), new_cache(model, compress="after_prefill")
    feed(model, whole, inputs)
    held.begin_prefill()
    for low in range(0, 60, size):
        part = {
            "input_ids": inputs["input_ids"][:, low : low + size],
            "attention_mask": inputs["attention_mask"][:, : low + size],
            "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[
                :, low : low + size
            ],
        }
        feed(model, held, part)
        waiting = [layer.ready.intake._queries.nbytes() for layer in held.compressed_layers]
    assert all(waiting)
    before = held.nbytes()
    held.end_prefill()
    assert held.nbytes() == whole.nbytes() < before
    for ours, theirs in zip(held.compressed_layers, whole.compressed_layers, strict=True):
        assert not ours.ready.intake._queries.nbytes()
        for a, b in zip(ours.state.groups, theirs.state.groups, strict=True):
            if a.recent_score is not None:
                torch.testing.assert_close(a.recent_score, b.recent_score, rtol=1e-4, atol=1e-4)
                assert torch.equal(a.store.position, b.store.position)
                torch.testing.assert_close(a.store.score, b.store.score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["pooled", "fastgen"])
def test_rules_for_each_request_rank_by_the_same_estimates(rule):
    """FastGen's choice waits for the prompt's end, a pooled budget does not: both see one score."""
    from kvcompress.plan import FastGenChoice, PooledBudget

    model, inputs = build("llama"), prompts(2, 60, [7, 0])
    head = KEEP_SETS["fastgen"]
    rules = {
        "pooled": PooledBudget(kind="pooled", scope="layer"),
        "fastgen": FastGenChoice(kind="fastgen", recovery=0.6),
    }
    stored = []
    for per_request in (None, rules[rule]):
        plan = plan_for(model, head, **ESTIMATED).model_copy(update={"per_request": per_request})
        attach(model, plan)
        cache = new_cache(model)
        feed(model, cache, inputs)
        cache.end_prefill()
        found = {}
        for number, layer in enumerate(cache.compressed_layers):
            (group,) = layer.state.groups
            row, own = group.store.segment_of_slot()
            places = zip(row.tolist(), own.tolist(), group.store.position.tolist(), strict=True)
            for place, score in zip(places, group.store.score.tolist(), strict=True):
                found[number, *place] = score
        stored.append(found)
    shared = [k for k in stored[0] if k in stored[1] and k[-1] >= 0 and stored[0][k] < 1e9]
    assert len(shared) > 20
    for key in shared:
        assert stored[0][key] == pytest.approx(stored[1][key], rel=1e-4)


@pytest.mark.parametrize(
    ("scorer", "rows", "stride"),
    [
        *((s, *r) for s in ("raw", "mean", "lift") for r in ((None, None), (12, None), (12, 8))),
        ("expected", None, None),  # looks at the rotary embedding too
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_profile_lets_the_same_rows_vote(family, scorer, rows, stride):
    """What the profile ranks tokens by at a prompt's end is what the runtime does."""
    model, ids = build(family), prompts(1, 128)["input_ids"][0].tolist()
    plan = plan_for(
        model,
        HeadPlan(frequent=Budget(tokens=500), **EXACT),
        scorer=scorer,
        score_rows=rows,
        score_stride=stride,
    )
    ranks = {}
    keep = Keep(scorer=scorer, score_rows=rows, score_stride=stride)
    turned = [found.rotation for found in find_rotations(model, plan.model, ids[-1])]
    with watching_rows(model, plan.model, keep, lambda r: ranks.__setitem__(r.layer, r), turned):
        forward(model, ids)
    attach(model, plan)
    cache = new_cache(model)
    length = ranks[0].prompt_tokens
    feed(model, cache, {"input_ids": torch.tensor([ids[:length]])})
    for number, layer in enumerate(cache.compressed_layers):
        (group,) = layer.state.groups
        row, head = group.store.segment_of_slot()
        position = group.store.position.long()
        real = position >= 0
        votes = length - position.clamp(min=layer.state.first_vote)
        own = layer.settings.scorer.rank(group.store.score, votes, length - 1)
        profiled = ranks[number].ranks[0]
        # a sliding window lets the runtime keep its newest tokens alone
        assert real.sum() > 20
        torch.testing.assert_close(
            own[real], profiled[head[real], position[real]], rtol=1e-4, atol=1e-5
        )


def test_only_voters_for_their_stride_wait_for_the_end():
    """What a held prompt keeps of its queries is a fraction of them."""
    model, ids = build("llama"), prompts(1, 90)["input_ids"]
    attach(model, plan_for(model, *SCORED, score_rows=6, score_stride=8))
    cache = new_cache(model, compress="after_prefill")
    cache.begin_prefill()
    for part in ids.split(32, 1):
        feed(model, cache, {"input_ids": part})
    noted = [own for _, (own,) in cache.compressed_layers[0].ready.intake._queries._noted]
    number = torch.arange(90)
    expected = score_queries.votes_for_its_stride(number, 8) | (number >= 84)
    assert torch.equal(torch.cat([own.position for own in noted]), number[expected])
    for own in noted:
        assert own.query.shape[1] == len(own.position) == own.normaliser.shape[1]


@pytest.mark.parametrize("score_queries", [{"score_rows": 5}, ESTIMATED])
def test_a_prompt_of_one_token_is_not_held_and_later_tokens_vote(score_queries):
    model, ids = build("llama"), prompts(1, 30)["input_ids"]
    attach(model, plan_for(model, *SCORED, **score_queries))
    held, plain = new_cache(model, compress="after_prefill"), new_cache(model)
    for token in ids.split(1, 1):
        ours, theirs = (feed(model, cache, {"input_ids": token}) for cache in (held, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert held.nbytes() == plain.nbytes()
    assert held.compressed_layers[0].state.first_vote == 0


def test_late_voters_of_an_empty_layer_are_nothing():
    assert LateScoreQueries().nbytes() == 0


@pytest.mark.parametrize("compress", ["per_chunk", "after_prefill"])
def test_latent_layers_let_all_rows_vote(compress):
    """Their attention is computed row by row in any case: nothing has to be estimated."""
    model, inputs = build("deepseek_v3"), prompts(2, 60, [7, 0])
    tokens = prompts(2, 72)["input_ids"][:, 60:]
    logits = []
    for settings in ({}, ESTIMATED):
        attach(model, plan_for(model, KEEP_SETS["frequent"], **settings))
        cache = new_cache(model, compress=compress)
        logits.append(oracle.feed(model, cache, inputs, tokens))
        detach(model)
    assert torch.equal(*logits)
    attach(model, plan_for(model, KEEP_SETS["frequent"], score_rows=5))
    with pytest.raises(KVCompressError, match="score_rows cannot hold the prompts of latent"):
        new_cache(model, compress="after_prefill")


@pytest.mark.parametrize("hold", [False, True])
def test_rows_that_a_mask_takes_out_do_not_vote(hold, seen):
    """Holes in a mask, behind a row's first token: no votes of theirs and none for them."""
    model, inputs = build("llama"), prompts(1, 60)
    inputs["attention_mask"][0, [3, 18, 19, 20, 21, 22, 40, 59]] = 0
    attach(model, plan_for(model, *SCORED, scorer="raw", **ESTIMATED))
    cache = new_cache(model, compress="after_prefill" if hold else "per_chunk")
    feed(model, cache, inputs)
    valid = inputs["attention_mask"][0].bool()
    number = torch.arange(60)
    counts = pair_weight(number, number, 55, 5, 4) * valid[:, None]
    for layer, (_, chunk, scores, _) in zip(cache.compressed_layers, seen, strict=True):
        if hold:
            intake = layer.ready.intake
            scores = intake.pending.scores
            intake._queries.vote(layer.state, intake.pending.chunk, scores)
        logits = chunk.query @ chunk.key.repeat_interleave(2, 1).mT * chunk.scaling
        hidden = (number[:, None] < number) | ~valid
        share = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        expected = (share.unflatten(1, (2, 2)).mean(2) * counts).sum(2)
        for index, score in scores.items():
            own = expected[:, layer.state.groups[index].index]
            torch.testing.assert_close(score, own, rtol=1e-4, atol=1e-5)
