"""Each rule of a layer's state is needed, asked for at a load and at a save, and not too strict.

That live states keep all of them is asserted after every step of tests/runtime/test_properties.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from kvcompress.plan import Budget, FastGenChoice, HeadPlan, PooledBudget, Threshold
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.saved.cachefile import CacheFileError
from kvcompress.runtime.store import rules as check
from kvcompress.runtime.store.rules import COUNTERS, TENSORS, broken, fits
from kvcompress.runtime.store.state import LayerState
from tests.runtime.models import build
from tests.runtime.test_persist import plan_for, talk

HEADS = [
    HeadPlan(special=True, punct=True, frequent=Budget(tokens=9), local=Budget(tokens=7)),
    HeadPlan(frequent=Budget(tokens=12), k_dtype="fp8", v_dtype="model"),
]
PADS = [7, 0]


def filled(heads=HEADS, per_request=None):
    model = build("llama")
    plan = plan_for(model, heads).model_copy(update={"per_request": per_request})
    attach(model, plan)
    spans = [[(3, 9), (30, 35)], [(20, 24)]] if per_request is None else ()
    cache = new_cache(model, protect=spans)
    talk(model, cache, PADS, 40, 1, 1, 1, 12, 1, 1)
    return model, cache


@pytest.fixture(scope="module")
def model_and_cache():
    return filled()


# ---- one way to break each rule and no other
def _turn_off(state: LayerState, seen: int) -> int:
    state.turn_starts = state.turn_starts[::-1]
    return seen


def _float(state: LayerState, seen: int) -> int:
    state.first_vote = float(state.first_vote)  # type: ignore[assignment]
    return seen


def _row_more(state: LayerState, seen: int) -> int:
    state.spans = [*state.spans, ()]
    return seen


def _endless(state: LayerState, seen: int) -> int:
    return 1 << 31


def _long_prompt(state: LayerState, seen: int) -> int:
    state.budget_length[1] = -1
    return seen


def _odd_class(state: LayerState, seen: int) -> int:
    state.class_counts[0][0] = 1
    return seen


def _early_vote(state: LayerState, seen: int) -> int:
    state.first_vote = -1
    return seen


def _mixed_spans(state: LayerState, seen: int) -> int:
    state.spans[0] = state.spans[0][::-1]
    return seen


def _granted(state: LayerState, seen: int) -> int:
    state.granted = [[head.frequent.tokens for head in state.settings.heads]] * 2  # type: ignore
    return seen


def _slot_more(state: LayerState, seen: int) -> int:
    store = state.groups[0].store
    store.relayout([[c + 1 for c in row] for row in store.capacities])
    return seen


def _segments(state: LayerState, seen: int) -> int:
    store = state.groups[0].store
    store.starts = [[start + 1 for start in row] for row in store.starts]
    return seen


def _start(state: LayerState, seen: int) -> int:
    state.row_seen[0] += 5  # more than there is room for behind the padding
    return seen


def _exact(state: LayerState, seen: int) -> int:
    state.exact_position[0, -1] = seen
    return seen


def _flag(state: LayerState, seen: int) -> int:
    assert state.exact_class is not None
    state.exact_class[1, 0] = 4
    return seen


def _window(state: LayerState, seen: int) -> int:
    state.groups[0].windows[0, 0] += 1
    return seen


def _twice(state: LayerState, seen: int) -> int:
    store = state.groups[0].store
    start = store.starts[1][0]
    held = store.position[start : start + store.capacities[1][0]]
    held[:2] = held.max()
    return seen


def _score(state: LayerState, seen: int) -> int:
    scores = state.groups[0].store.score
    assert scores is not None
    scores[0] = torch.nan
    return seen


def _scale(state: LayerState, seen: int) -> int:
    scales = state.groups[0].store.keys.scale
    assert scales is not None
    scales[0] = -1
    return seen


def _vector(state: LayerState, seen: int) -> int:
    state.exact_v[0, 0, 0, 0] = torch.inf
    return seen


def _no_positions(state: LayerState, seen: int) -> int:
    state.positions = 0
    return seen


Bend = Callable[[LayerState, int], int]
BENDS: dict[str, Bend] = dict(
    zip(
        [*COUNTERS, *TENSORS],
        [_float, _row_more, _endless, _no_positions, _long_prompt, _odd_class, _early_vote]
        + [_mixed_spans]
        + [_turn_off, _granted, _slot_more, _segments, _start, _exact, _flag, _window, _twice]
        + [_score, _scale, _vector],
        strict=True,
    )
)


@pytest.mark.parametrize("words", BENDS)
def test_without_a_rule_something_is_taken_that_it_refuses(words, model_and_cache, monkeypatch):
    layer = model_and_cache[1].compressed_layers[0]
    state = copy.deepcopy(layer.state)
    assert broken(state, layer.seen) is None
    seen = BENDS[words](state, layer.seen)
    assert broken(state, seen) == words
    monkeypatch.delitem(COUNTERS if words in COUNTERS else TENSORS, words)
    assert broken(state, seen) is None


@pytest.mark.parametrize("words", [*COUNTERS, *TENSORS])
def test_each_rule_is_asked_at_a_load_and_at_a_save(words, model_and_cache, monkeypatch, tmp_path):
    model, cache = model_and_cache
    path = tmp_path / "cache.kvc"
    cache.save(path)
    CompressedCache.load(path, model)
    rules = COUNTERS if words in COUNTERS else TENSORS
    monkeypatch.setitem(rules, words, lambda state, seen: False)
    with pytest.raises(CacheFileError, match=f"damaged .*not so: {words}"):
        CompressedCache.load(path, model)
    with pytest.raises(CacheFileError, match=f"layer 0 cannot be saved, not so: {words}"):
        cache.save(path)


RULES = {
    "fastgen": FastGenChoice(kind="fastgen", recovery=0.7),
    "pooled": PooledBudget(kind="pooled", floor=0.2),
    "threshold": Threshold(kind="threshold", at_least=0.01),
}
ALL_PARTS = [
    HeadPlan(special=True, punct=True, frequent=Budget(tokens=9), local=Budget(ratio=0.3)),
    HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.4), local=Budget(tokens=6)),
]


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_granted_is_saved_and_goes_on(name, tmp_path):
    """The heads that a row has by its grant are ranked by their own rules after a load too."""
    model, cache = filled(ALL_PARTS, RULES[name])
    assert any(layer.state.granted for layer in cache.compressed_layers)
    cache.save(tmp_path / "cache.kvc")
    loaded = CompressedCache.load(tmp_path / "cache.kvc", model)
    for one, other in zip(loaded.compressed_layers, cache.compressed_layers, strict=True):
        for ours, theirs in zip(one.state.groups, other.state.groups, strict=True):
            assert torch.equal(ours.rules.classes, theirs.rules.classes)
            assert torch.equal(ours.rules.by_score, theirs.rules.by_score)
    turns = (1, 1, 9, *[1] * 30)
    expected = talk(model, cache, PADS, *turns)
    assert torch.equal(talk(model, loaded, PADS, *turns), expected)
    assert [broken(x.state, x.seen) for x in cache.compressed_layers] == [None, None]


def test_nan_is_refused_at_the_save(model_and_cache, tmp_path):
    model, cache = model_and_cache
    sick = copy.deepcopy(cache)
    sick.compressed_layers[1].state.exact_k[0] = torch.nan
    with pytest.raises(CacheFileError, match="layer 1 cannot be saved.*keys and values are finite"):
        sick.save(tmp_path / "cache.kvc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1 << 63, int, False),
        (1, bool, False),
        ([1, 2], list[int], True),
        ((1, 2), list[int], False),
        ([1, "2"], list[int], False),
        ([[1], []], list[list[int]], True),
        ([(range(0, 2),)], list[tuple[range, ...]], True),
        ([(range(0, 1 << 64),)], list[tuple[range, ...]], False),
        (None, list[str] | None, True),
        ("x", list[str] | None, False),
    ],
)
def test_types_are_as_strict_as_json(value, hint, fit):
    assert fits(value, hint) is fit


def test_no_rule_is_forgotten():
    assert list(BENDS) == [*check.COUNTERS, *check.TENSORS]
