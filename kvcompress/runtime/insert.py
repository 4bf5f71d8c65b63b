"""Taking one decoded token in: it becomes the newest recent token, and the oldest recent token is
encoded over the victim's slot, or dropped. Nothing else moves."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.accounting import GROW_TOKENS
from kvcompress.evict.keepset import priority
from kvcompress.runtime.attend import Chunk
from kvcompress.runtime.commit import to_code_space, votes
from kvcompress.runtime.state import Group, LayerState
from kvcompress.runtime.store import EMPTY, Bucket


class Leaver:
    """The token of each row that leaves the recent ones.

    Attributes:
        slot: ``[B]`` its place among the recent slots.
        key, value: ``[B, Hkv, D]``.
        position: ``[B]`` int64, −1 if the row had a free slot.
        flags: ``[B]`` int64.
    """

    def __init__(self, state: LayerState) -> None:
        recent = state.recent
        row = torch.arange(state.batch, device=state.start.device)
        self.slot = state.exact_position[:, recent].argmin(1)
        place = self.slot + state.settings.sink_tokens
        self.key, self.value = state.exact_k[row, :, place], state.exact_v[row, :, place]
        self.position = state.exact_position[row, place].long()
        self.flags = torch.zeros_like(self.position)
        if state.exact_class is not None:
            self.flags = state.exact_class[row, place].long()


def insert(state: LayerState, chunk: Chunk, scores: dict[int, Tensor]) -> None:
    """Take a chunk of one token, valid in every row, into a layer whose sinks are full."""
    leaver = Leaver(state)
    state.row_seen = [seen + 1 for seen in state.row_seen]
    _grow(state, leaver)
    exact = state.settings.exact_tokens
    if any(seen > exact for seen in state.row_seen):
        for group in state.groups:
            _insert_group(state, group, leaver, chunk.position)
    row = torch.arange(state.batch, device=leaver.slot.device)
    place = leaver.slot + state.settings.sink_tokens
    state.exact_k[row, :, place] = chunk.key[:, :, 0]
    state.exact_v[row, :, place] = chunk.value[:, :, 0]
    state.exact_position[row, place] = chunk.position
    if state.exact_class is not None:
        state.exact_class[row, place] = 0 if chunk.flags is None else chunk.flags[:, 0]
    for number, score in scores.items():
        recent_score = state.groups[number].recent_score
        assert recent_score is not None
        recent_score[row, :, leaver.slot] = score[:, :, 0]


def _grow(state: LayerState, leaver: Leaver) -> None:
    """Make room where a segment's capacity steps up: every block of tokens, or a class token."""
    exact = state.settings.exact_tokens
    steps = any((seen - exact) % GROW_TOKENS == 1 for seen in state.row_seen)
    if state.settings.uses_classes:
        leaving = leaver.flags * (leaver.position >= 0)
        for row, flags in enumerate(leaving.tolist()):
            if flags:
                state.class_counts[row][flags] += 1
                steps = True
    if not steps:
        return
    for group in state.groups:
        capacities = state.capacities(group)
        if capacities != group.store.capacities:
            group.store.relayout(capacities)


def _insert_group(state: LayerState, group: Group, leaver: Leaver, now: int) -> None:
    protected = (leaver.flags[:, None] & group.rules.classes) != 0  # [B, Hg]
    for bucket in group.store.buckets():
        row, head = bucket.batch, bucket.head
        rank = _bucket_rank(state, group, bucket, now)
        victim = rank.argmin(1)
        score = None
        if group.recent_score is not None:
            score = group.recent_score[row, head, leaver.slot[row]]
        position = leaver.position[row]
        own_rank = priority(
            group.rules,
            state.settings.scorer,
            head,
            group.windows[row, head],
            position,
            score,
            protected[row, head],
            votes(state, position, now),
            now,
        )
        taken = (own_rank >= rank.gather(1, victim[:, None])[:, 0]) & (own_rank > -torch.inf)
        chosen = taken.nonzero()[:, 0]
        if not len(chosen):
            continue
        slots = bucket.start + chosen * bucket.capacity + victim[chosen]
        if score is not None:
            score = score.masked_fill(protected[row, head], torch.inf)[chosen]
        _write(state, group, leaver, slots, row[chosen], group.index[head[chosen]], score)


def _bucket_rank(state: LayerState, group: Group, bucket: Bucket, now: int) -> Tensor:
    """``[S, C]`` priority of what a bucket holds; outside the architecture's window it is empty."""
    position = bucket.position.long()
    if state.settings.window is not None:
        position = position.masked_fill(position < now + 2 - state.settings.window, EMPTY)
    head = bucket.head[:, None]
    if bucket.score is not None:
        protected = bucket.score == torch.inf
    else:
        protected = ((group.rules.classes != 0) & ~group.rules.keeps_rest)[head] & (position >= 0)
    return priority(
        group.rules,
        state.settings.scorer,
        head,
        group.windows[bucket.batch, bucket.head][:, None],
        position,
        bucket.score,
        protected,
        votes(state, position, now),
        now,
    )


def _write(
    state: LayerState,
    group: Group,
    leaver: Leaver,
    slots: Tensor,
    row: Tensor,
    head: Tensor,
    score: Tensor | None,
) -> None:
    center, scale = state.settings.key_constants(slots.device)
    kind = group.store.kind

    def rows_of(part: slice) -> tuple[Tensor, Tensor]:
        key = leaver.key[row[part], head[part]]
        key = to_code_space(key, head[part], center, scale, kind.k_dtype)
        return key, leaver.value[row[part], head[part]]

    group.store.write(slots, rows_of, leaver.position[row], score)
