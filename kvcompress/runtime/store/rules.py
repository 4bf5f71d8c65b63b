"""What the runtime relies on in the state of a layer: every rule, once, with its words.

`broken` is asked of a state that came from a file before anything uses it, of one that is about to
be saved, and by tests after every step. Codes and vectors may be any finite numbers; whatever says
where something lies, how much there is, or what comes next has to hold.

`COUNTERS` look at the host's numbers alone, so that they can be asked before a tensor is read; each
relies on those before it. `TENSORS` look at what the tensors hold, and rely on their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from kvcompress.evict.keep_set_ladder import fastgen_ladder
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.quant.codec import Codes
from kvcompress.runtime.store.segments import EMPTY, Group, SegmentStore, place_segments
from kvcompress.runtime.store.state import MOST_TOKENS, LayerState

NEVER: Final = 1 << 60  # a first vote that no position reaches
_WORD: Final = 1 << 63

Rule = Callable[[LayerState, int], bool]


def broken(state: LayerState, seen: int) -> str | None:
    """The first rule that a layer's state breaks, None where all hold.

    Args:
        seen: tokens that the layer took in, padding included.
    """
    return first_broken(COUNTERS, state, seen) or first_broken(TENSORS, state, seen)


def first_broken(rules: dict[str, Rule], state: LayerState, seen: int) -> str | None:
    return next((words for words, holds in rules.items() if not holds(state, seen)), None)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as strictly as JSON tells them apart: True is no number. Whole
    numbers have 64 bits; tensors and dataclasses are whatever they are."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in inner)
    if origin is list:
        return type(value) is list and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return type(value) is tuple and all(fits(item, inner[0]) for item in value)
    if hint is int:
        return type(value) is int and -_WORD <= value < _WORD
    if hint is range:
        return type(value) is range and fits([value.start, value.stop], list[int])
    return type(value) is hint or hint not in (bool, str, float, NoneType)


# ---- the host's numbers
@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(LayerState)


def _types(state: LayerState, seen: int) -> bool:
    return type(seen) is int and all(fits(getattr(state, n), hint) for n, hint in _hints().items())


def _rows(state: LayerState, seen: int) -> bool:
    lists = (state.row_seen, state.budget_length, state.class_counts, state.spans)
    return {len(line) for line in lists} == {state.exact_position.shape[0]} and state.batch > 0


def _lengths(state: LayerState, seen: int) -> bool:
    return seen < MOST_TOKENS and all(0 <= n <= seen for n in state.row_seen)


def _constants(state: LayerState, seen: int) -> bool:
    return 0 < state.positions <= state.settings.plan.max_position


def _budgets(state: LayerState, seen: int) -> bool:
    return all(0 <= b <= n for b, n in zip(state.budget_length, state.row_seen, strict=True))


def _coded(state: LayerState) -> list[int]:
    return [max(0, n - state.settings.exact_tokens) for n in state.row_seen]


def _classes(state: LayerState, seen: int) -> bool:
    if not state.settings.uses_classes:
        return not any(map(any, state.class_counts))
    return all(
        len(counts) == 4 and min(counts) >= 0 and not counts[0] and sum(counts) <= most
        for counts, most in zip(state.class_counts, _coded(state), strict=True)
    )


def _votes(state: LayerState, seen: int) -> bool:
    return 0 <= state.first_vote <= seen or state.first_vote == NEVER


def _spans(state: LayerState, seen: int) -> bool:
    for spans in state.spans:
        bounds = [bound for span in spans for bound in (span.start, span.stop)]
        if bounds != sorted(bounds) or min(bounds, default=0) < 0:
            return False
        if any(span.step != 1 or not span for span in spans):
            return False
    return True


def _turns(state: LayerState, seen: int) -> bool:
    turns = state.turn_starts
    in_order = turns == sorted(turns) and turns[0] == 0 and turns[-1] <= seen if turns else False
    return in_order and len(turns) <= seen


def _granted(state: LayerState, seen: int) -> bool:
    settings = state.settings
    if not state.granted:
        return True
    if settings.plan.per_request is None or len(state.granted) != state.batch:
        return False
    most = len(fastgen_ladder(None, None, "model", "model")) if settings.chosen_by_head else _WORD
    heads = len(settings.heads)
    return all(len(row) == heads and all(0 <= n < most for n in row) for row in state.granted)


def _capacities(state: LayerState, seen: int) -> bool:
    return all(g.store.capacities == state.capacities(g) for g in state.groups)


COUNTERS: Final[dict[str, Rule]] = {
    "its counters have the types that counters have": _types,
    "each list of its rows has one entry for a row": _rows,
    "a row has at most the tokens that were seen": _lengths,
    "its key constants are for positions that the plan has": _constants,
    "a prompt ended within its row": _budgets,
    "class tokens are among the coded tokens": _classes,
    "votes begin at a token that was seen": _votes,
    "protected spans lie apart and in order": _spans,
    "turns begin in order, at tokens that were seen": _turns,
    "grants are what the plan's rule gives": _granted,
    "capacities are what the plan grants": _capacities,
}


# ---- what the tensors hold
def _layout(state: LayerState, seen: int) -> bool:
    for group in state.groups:
        store = group.store
        order, starts = place_segments(store.capacities)
        index = torch.stack([store.batch_index, store.head_index], 1).tolist()
        if starts != store.starts or index != [list(pair) for pair in order]:
            return False
    return True


def _starts(state: LayerState, seen: int) -> bool:
    return all(
        0 <= start <= seen - n if n else start == EMPTY
        for start, n in zip(state.start.tolist(), state.row_seen, strict=True)
    )


def _exact(state: LayerState, seen: int) -> bool:
    sinks = state.settings.sink_tokens
    for start, n, line in zip(
        state.start.tolist(), state.row_seen, state.exact_position.tolist(), strict=True
    ):
        first = [p for p in line[:sinks] if p != EMPTY]
        recent = sorted(p for p in line[sinks:] if p != EMPTY)
        held = first + recent
        if any(a >= b for a, b in zip(held, held[1:], strict=False)):
            return False
        if first != line[: len(first)] or len(first) != min(sinks, n):
            return False
        if len(recent) != min(state.settings.recent_tokens, n - len(first)):
            return False
        if held and (held[0] < start or held[-1] >= seen or (first and first[0] != start)):
            return False
    return True


def _flags(state: LayerState, seen: int) -> bool:
    known = SPECIAL_FLAG | PUNCT_FLAG
    return state.exact_class is None or int(state.exact_class.max()) <= known


def _windows(state: LayerState, seen: int) -> bool:
    return all(g.windows.tolist() == state.windows_of(g) for g in state.groups)


def _positions(state: LayerState, seen: int) -> bool:
    """Coded tokens lie behind the sinks and before the recent ones, each once in its segment."""
    sinks = state.exact_position[:, : state.settings.sink_tokens]
    low = torch.cat([sinks, state.start[:, None] - 1], 1).amax(1)
    full = torch.tensor([n > 0 for n in _coded(state)], device=low.device)
    high = state.exact_position[:, state.recent].amin(1).where(full, 0)
    return all(_positions_of(group.store, low, high) for group in state.groups)


def _positions_of(store: SegmentStore, low: Tensor, high: Tensor) -> bool:
    position = store.position
    row, head = store.segment_of_slot()
    inside = (position > low[row]) & (position < high[row])
    if not bool((inside | (position == EMPTY)).all()):
        return False
    width = len(store.capacities[0])
    place = (row * width + head) * MOST_TOKENS + position
    place = place[position != EMPTY]
    if not bool((place.diff() > 0).all()):  # as a prompt leaves them; decoding mixes them up
        place = place.sort().values
    return bool((place.diff() > 0).all())


def _scores(state: LayerState, seen: int) -> bool:
    """+inf is the score of a protected token."""
    held = [s for g in state.groups for s in (g.store.score, g.recent_score) if s is not None]
    return all(bool((score > -torch.inf).all()) for score in held)


def _scales(state: LayerState, seen: int) -> bool:
    for group in state.groups:
        for codes in (group.store.keys, group.store.values):
            if codes.scale is not None and not bool(
                ((codes.scale >= 0) & _finite(codes.scale)).all()
            ):
                return False
            if codes.minimum is not None and not bool(_finite(codes.minimum).all()):
                return False
    return True


def _finite(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        return (tensor.view(torch.uint8) & 0x7F) != 0x7F
    return tensor.isfinite()


def _vectors(state: LayerState, seen: int) -> bool:
    held = [state.exact_k, state.exact_v]
    held += [own.data for group in state.groups for own in _codes(group)]
    return all(bool(_finite(t).all()) for t in held if t.is_floating_point())


def _codes(group: Group) -> tuple[Codes, Codes]:
    return group.store.keys, group.store.values


TENSORS: Final[dict[str, Rule]] = {
    "segments lie in the order of their capacities": _layout,
    "a row starts at a token that was seen": _starts,
    "sinks and recent tokens are a row's first and newest": _exact,
    "class flags are those of special tokens and punctuation": _flags,
    "local windows are the plan's": _windows,
    "coded tokens lie between sinks and recent ones, each once": _positions,
    "scores are numbers": _scores,
    "scales and minima are finite": _scales,
    "keys and values are finite": _vectors,
}
