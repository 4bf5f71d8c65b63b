"""Taking one decoded token in: it becomes the newest recent token, and the oldest recent token is
encoded over the victim's slot, or dropped. Nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.accounting import GROW_TOKENS
from kvcompress.runtime.prompt.attention_inputs import frequent_tokens
from kvcompress.runtime.prompt.store_prompt import quota_tokens
from kvcompress.runtime.step.token_rule import (
    LeavingToken,
    Ranked,
    Segments,
    encoded,
    ranked,
    take_exact_slot,
    weakest,
)
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.segments import Bucket, Group
from kvcompress.runtime.store.state import LayerState


def decodes(state: LayerState, chunk: Chunk) -> bool:
    """Whether a chunk is one decoded token, for which the layer keeps its layout."""
    full_sinks = min(state.row_seen) >= state.settings.sink_tokens
    one = chunk.key.shape[2] == 1 and chunk.valid is None
    return one and full_sinks and any(state.row_seen)


def store_token(state: LayerState, chunk: Chunk, scores: dict[int, Tensor]) -> None:
    """Take a chunk of one token, valid in every row, into a layer whose sinks are full."""
    leaving, now = LeavingToken.at(state, state.oldest_recent()), chunk.position
    state.row_seen = [seen + 1 for seen in state.row_seen]
    counted = leaving.flags * (leaving.position >= 0)
    state.grow(counted.tolist() if state.settings.uses_classes else [])
    exact = state.settings.exact_tokens
    if any(seen > exact for seen in state.row_seen):
        _grow_to_threshold(state, leaving, now)
        for group in state.groups:
            _store_in_group(state, group, leaving, now)
    flags = torch.zeros_like(leaving.flags) if chunk.flags is None else chunk.flags[:, 0]
    position = torch.full_like(leaving.position, now)
    take_exact_slot(state, leaving.slot, chunk.key, chunk.value, position, flags)
    recent = (leaving.slot - state.settings.sink_tokens)[:, None, None]
    for number, score in scores.items():
        held = state.groups[number].recent_score
        if held is not None:
            held.scatter_(2, recent.expand(score.shape), score)


def _grow_to_threshold(state: LayerState, leaving: LeavingToken, now: int) -> None:
    """Make room for tokens that a threshold keeps, where no slot is free or has fallen below it."""
    threshold = state.settings.keep_if_above
    if threshold is None or not state.granted:
        return
    grown = False
    for group in state.groups:
        if not group.store.kind.scored:
            continue
        budget, score = frequent_tokens(state, group), _own_score(state, group, leaving)
        for bucket, found in _ranked(state, group, leaving, score, now):
            full = (found.rank >= threshold).all(1)
            for place in full.nonzero()[:, 0].tolist():
                row, member = int(bucket.batch[place]), int(bucket.head[place])
                head, most = group.heads[member], int(budget[row, member])
                more = min(most, state.granted[row][head] + GROW_TOKENS)
                grown = grown or more > state.granted[row][head]
                state.granted[row][head] = more
    if grown:
        state.relayout()


def _store_in_group(state: LayerState, group: Group, leaving: LeavingToken, now: int) -> None:
    """In each head the leaving token takes the slot of the lowest ranked one, or is dropped."""
    slots, rows, heads = [], [], []
    score = _own_score(state, group, leaving)
    for bucket, found in _ranked(state, group, leaving, score, now):
        rank = found.rank
        if state.settings.plan.turn_tokens and len(state.turn_starts) > 1:
            rank = _spare_small_turns(state, found, quota_tokens(state, bucket.capacity))
        victim, taken = weakest(rank)
        chosen = taken.nonzero()[:, 0]
        slots.append(bucket.start + chosen * bucket.capacity + victim[chosen])
        rows.append(bucket.batch[chosen])
        heads.append(bucket.head[chosen])
    if not sum(map(len, slots)):
        return
    slot, row, member = torch.cat(slots), torch.cat(rows), torch.cat(heads)
    head, (center, scale) = group.index[member], state.key_constants()
    kind, pair = group.store.kind, (leaving.key[row, head], leaving.value[row, head])
    codes = encoded(*pair, (center[head], scale[head]), kind.k_dtype, kind.v_dtype)
    own = None if score is None else score[row, member, 0]
    group.store.put(slot, codes, leaving.position[row], own)


def _own_score(state: LayerState, group: Group, leaving: LeavingToken) -> Tensor | None:
    """``[B, Hg, 1]`` of the leaving token."""
    if group.recent_score is None:
        return None
    recent = (leaving.slot - state.settings.sink_tokens)[:, None, None]
    held = group.recent_score.gather(2, recent.expand(-1, len(group.heads), 1))
    return leaving.score(group.rules.classes, held)


def _ranked(
    state: LayerState, group: Group, leaving: LeavingToken, score: Tensor | None, now: int
) -> Iterator[tuple[Bucket, Ranked]]:
    """The buckets of a group with the priorities of what they hold, and of the leaving token.

    Args:
        score: ``[B, Hg, 1]`` of the leaving token.
    """
    bounds, in_class = state.span_bounds(), None
    if score is None and state.settings.uses_classes:
        in_class = leaving.in_class(group.rules.classes.expand(state.batch, -1))
    for bucket in group.store.buckets():
        row, head = bucket.batch, bucket.head
        own = Segments(
            head=group.at(row[:, None], head[:, None]),
            window=group.windows[row, head][:, None],
            start=state.start[row].long()[:, None],
            bounds=None if bounds is None else bounds[row][:, None],
            position=bucket.position,
            own_position=leaving.position[row][:, None],
            score=bucket.score,
            own_score=None if score is None else score[row, head],
            own_in_class=None if in_class is None else in_class[row, head],
        )
        yield bucket, ranked(state.settings, group.rules, own, now, state.first_vote)


def _spare_small_turns(state: LayerState, found: Ranked, quota: int) -> Tensor:
    """Ranks in which the tokens of a turn that holds at most `quota` stand at +inf, unless every
    turn of the segment is as small, or it has a free slot."""
    turn = state.turn_of(found.position).clamp(min=0)
    free = found.rank > -torch.inf
    if found.pinned is not None:
        free = free & ~found.pinned
    sizes = torch.zeros(len(turn), len(state.turn_starts), dtype=torch.int64, device=turn.device)
    count = sizes.scatter_add_(1, turn, free.long()).gather(1, turn)
    spared = free & (count <= quota)
    all_spared = (spared | ~free).all(1)
    has_room = (found.rank[:, :-1] == -torch.inf).any(1)
    return found.rank.masked_fill(spared & ~(all_spared | has_room)[:, None], torch.inf)
