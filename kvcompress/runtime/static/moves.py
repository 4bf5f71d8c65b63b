"""From a growing layer into the fixed arrays of a static one, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.accounting import budget_tokens
from kvcompress.plan import HeadPlan
from kvcompress.runtime.static.state import RowSpans, StaticGroup, StaticState
from kvcompress.runtime.store.segments import EMPTY, Group
from kvcompress.runtime.store.state import LayerState


def freeze(source: LayerState, seen: int, into: StaticState) -> None:
    """Lay a growing state that has seen `seen` tokens into the fixed arrays."""
    into.exact_k.copy_(source.exact_k[:, into.heads])
    into.exact_v.copy_(source.exact_v[:, into.heads])
    into.exact_position.copy_(source.exact_position)
    into.start.copy_(source.start)
    into.positions = source.positions
    for target, constant in zip((into.center, into.scale), source.key_constants(), strict=True):
        target.copy_(constant[into.heads])
    into.row_seen.copy_(torch.tensor(source.row_seen))
    into.budget_length.copy_(torch.tensor(source.budget_length))
    into.budget.copy_(torch.tensor(_budgets(source, into)))
    into.counter.fill_(seen)
    into.first_vote.fill_(source.first_vote)
    if into.spans is not None:
        into.spans.copy_(torch.tensor(_bounds(source.spans, into.spans.shape[1])))
    if into.exact_class is not None and source.exact_class is not None:
        into.exact_class.copy_(source.exact_class)
    if into.class_counts is not None:
        into.class_counts.copy_(torch.tensor(source.class_counts))
    for mine in into.groups:
        mine.position.fill_(EMPTY)
        for theirs in source.groups:
            places = _places(mine, theirs)
            if not places:
                continue
            own, other = zip(*places, strict=True)
            heads = torch.tensor(own, device=into.start.device)
            into.windows[:, heads + mine.span.start] = theirs.windows[:, list(other)]
            if mine.recent_score is not None and theirs.recent_score is not None:
                mine.recent_score[:, heads] = theirs.recent_score[:, list(other)]
            here, there = _slots(mine, theirs, places)
            for target, values in _pairs(mine, theirs):
                target[here] = values[there]


def thaw(source: StaticState) -> LayerState:
    """The growing state that `freeze` would lay into these arrays; a copy."""
    bounds = [[]] * source.batch if source.spans is None else source.spans.tolist()
    spans = [tuple(range(a, b) for a, b in row if b > a) for row in bounds]
    state = LayerState.empty(source.settings, source.exact_k, source.exact_v, spans)
    state.positions = source.positions
    state.exact_k = source.exact_k[:, source.restore]
    state.exact_v = source.exact_v[:, source.restore]
    state.exact_position, state.start = source.exact_position.clone(), source.start.clone()
    state.row_seen = source.row_seen.tolist()
    state.budget_length = source.budget_length.tolist()
    state.first_vote = int(source.first_vote)
    if source.exact_class is not None and source.class_counts is not None:
        state.exact_class = source.exact_class.clone()
        state.class_counts = source.class_counts.tolist()
    state.resolve_windows()
    for theirs in state.groups:
        theirs.store.relayout(state.capacities(theirs))
        for mine in source.groups:
            places = _places(mine, theirs)
            if not places:
                continue
            if mine.recent_score is not None and theirs.recent_score is not None:
                own, other = zip(*places, strict=True)
                theirs.recent_score[:, list(other)] = mine.recent_score[:, list(own)]
            here, there = _slots(mine, theirs, places)
            for held, target in _pairs(mine, theirs):
                target[there] = held[here]
    return state


def _places(mine: StaticGroup, theirs: Group) -> list[tuple[int, int]]:
    """Heads that are in both groups, by their number in each."""
    if (mine.k_dtype, mine.v_dtype) != (theirs.store.kind.k_dtype, theirs.store.kind.v_dtype):
        return []
    order = [h for block in mine.blocks for h in block.heads]
    return [(number, theirs.heads.index(h)) for number, h in enumerate(order) if h in theirs.heads]


def _slots(
    mine: StaticGroup, theirs: Group, places: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Flat slots of what the growing group has room for: static and growing.

    Both fill a segment from its first slot, and overwrite the same ones.
    """
    store, base = theirs.store, mine.base.tolist()
    here, there = [], []
    for row, (starts, capacities) in enumerate(zip(store.starts, store.capacities, strict=True)):
        for own, other in places:
            slots = torch.arange(capacities[other])
            here.append(slots + base[row][own])
            there.append(slots + starts[other])
    device = mine.position.device
    return torch.cat(here).to(device), torch.cat(there).to(device)


def _pairs(mine: StaticGroup, theirs: Group) -> Iterator[tuple[Tensor, Tensor]]:
    """(static, growing) arrays with one entry per slot."""
    store = theirs.store
    both = [(mine.position, store.position), (mine.score, store.score)]
    for own, other in ((mine.keys, store.keys), (mine.values, store.values)):
        both += [(own.data, other.data), (own.scale, other.scale), (own.minimum, other.minimum)]
    for own_t, other_t in both:
        if own_t is not None and other_t is not None:
            yield own_t, other_t


def _budgets(source: LayerState, into: StaticState) -> list[list[int]]:
    """Slots that each (row, head) may use, class tokens and protected ones aside."""
    settings = source.settings

    def granted(head: HeadPlan, capacity: int, length: int) -> int:
        if head.full:
            return capacity
        return min(capacity, budget_tokens(head, length, settings.recent_tokens))

    blocks = [block for group in into.groups for block in group.blocks]
    return [
        [
            granted(settings.heads[h], block.capacity, length)
            for block in blocks
            for h in block.heads
        ]
        for length in source.budget_length
    ]


def _bounds(spans: RowSpans, most: int) -> list[list[list[int]]]:
    return [[[s.start, s.stop] for s in row] + [[0, 0]] * (most - len(row)) for row in spans]
