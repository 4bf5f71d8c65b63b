"""Taking one decoded token in: it becomes the newest recent token, and the oldest recent token is
encoded over the victim's slot, or dropped. Nothing else moves."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.accounting import GROW_TOKENS
from kvcompress.evict.keepset import class_score, priority
from kvcompress.runtime.prompt.attention_inputs import frequent_tokens
from kvcompress.runtime.prompt.store_prompt import quota_tokens, to_code_space, votes
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.segments import Bucket
from kvcompress.runtime.store.state import Group, LayerState
from kvcompress.runtime.torch_modes import leaving_plain_tensors


class OutgoingToken:
    """The token of each row that leaves the recent ones.

    Attributes:
        slot: ``[B]`` its place among the recent slots.
        key, value: ``[B, Hkv, D]``.
        position: ``[B]`` int64, −1 if the row had a free slot.
        flags: ``[B]`` int64.
    """

    def __init__(self, state: LayerState) -> None:
        row, place = state.oldest_recent()
        self.slot = place - state.settings.sink_tokens
        self.key, self.value = state.exact_k[row, :, place], state.exact_v[row, :, place]
        self.position = state.exact_position[row, place].long()
        self.flags = torch.zeros_like(self.position)
        if state.exact_class is not None:
            self.flags = state.exact_class[row, place].long()


def store_token(state: LayerState, chunk: Chunk, scores: dict[int, Tensor]) -> None:
    """Take a chunk of one token, valid in every row, into a layer whose sinks are full."""
    outgoing = OutgoingToken(state)
    state.row_seen = [seen + 1 for seen in state.row_seen]
    leaving = outgoing.flags * (outgoing.position >= 0)
    grow(state, leaving.tolist() if state.settings.uses_classes else [])
    exact = state.settings.exact_tokens
    if any(seen > exact for seen in state.row_seen):
        _grow_to_threshold(state, outgoing, chunk.position)
        for group in state.groups:
            _store_in_group(state, group, outgoing, chunk.position)
    row, place = state.rows(), outgoing.slot + state.settings.sink_tokens
    state.exact_k[row, :, place] = chunk.key[:, :, 0]
    state.exact_v[row, :, place] = chunk.value[:, :, 0]
    state.exact_position[row, place] = chunk.position
    if state.exact_class is not None:
        state.exact_class[row, place] = 0 if chunk.flags is None else chunk.flags[:, 0]
    for number, score in scores.items():
        recent_score = state.groups[number].recent_score
        assert recent_score is not None
        recent_score[row, :, outgoing.slot] = score[:, :, 0]


def grow(state: LayerState, leaving_flags: list[int]) -> None:
    """Make room where a segment's capacity steps up: a block of tokens, a class token, a span.

    Args:
        leaving_flags: per row, class flags of the token that leaves the recent ones; 0 for none.
    """
    exact = state.settings.exact_tokens
    steps = any((seen - exact) % GROW_TOKENS == 1 for seen in state.row_seen) or any(state.spans)
    for row, flags in enumerate(leaving_flags):
        if flags:
            state.class_counts[row][flags] += 1
            steps = True
    if steps:
        _relayout(state)


def _grow_to_threshold(state: LayerState, outgoing: OutgoingToken, now: int) -> None:
    """Make room for tokens that a threshold keeps, where no slot is free or has fallen below it."""
    threshold = state.settings.keep_if_above
    if threshold is None or not state.granted:
        return
    grown = False
    for group in state.groups:
        budget = frequent_tokens(state, group)
        for bucket in group.store.buckets() if group.store.kind.scored else ():
            held = _Ranked(state, group, bucket, now)
            own = _Ranked.of_outgoing(state, group, bucket, outgoing, now)
            full = (own.rank >= threshold) & (held.rank >= threshold).all(1)
            for place in full.nonzero()[:, 0].tolist():
                row, member = int(bucket.batch[place]), int(bucket.head[place])
                head, most = group.heads[member], int(budget[row, member])
                more = min(most, state.granted[row][head] + GROW_TOKENS)
                grown = grown or more > state.granted[row][head]
                state.granted[row][head] = more
    if grown:
        _relayout(state)


@leaving_plain_tensors
def _relayout(state: LayerState) -> None:
    for group in state.groups:
        capacities = state.capacities(group)
        if capacities != group.store.capacities:
            group.store.relayout(capacities)


def _store_in_group(state: LayerState, group: Group, outgoing: OutgoingToken, now: int) -> None:
    for bucket in group.store.buckets():
        row, head = bucket.batch, bucket.head
        held = _Ranked(state, group, bucket, now)
        own = _Ranked.of_outgoing(state, group, bucket, outgoing, now)
        victim, taken = _choose(state, held, own, bucket.capacity)
        chosen = taken.nonzero()[:, 0]
        if not len(chosen):
            continue
        slots = bucket.start + chosen * bucket.capacity + victim[chosen]
        score = None if own.score is None else own.score[chosen]
        _write(state, group, outgoing, slots, row[chosen], group.index[head[chosen]], score)


class _Ranked:
    """Tokens with their priority: what a bucket holds ``[S, C]``, or what wants in ``[S]``.

    Attributes:
        position: −1 where empty or out of the architecture's sight.
        pinned: bool, or None if no row has a protected span.
    """

    def __init__(self, state: LayerState, group: Group, bucket: Bucket, now: int) -> None:
        row, head = bucket.batch[:, None], bucket.head[:, None]
        stored = bucket.position.long()
        classes = (group.rules.classes != 0) & ~group.rules.keeps_rest
        self.score = bucket.score
        self._rank(state, group, row, head, stored, classes[group.at(row, head)], now)

    @staticmethod
    def of_outgoing(
        state: LayerState, group: Group, bucket: Bucket, outgoing: OutgoingToken, now: int
    ) -> _Ranked:
        own = object.__new__(_Ranked)
        row, head = bucket.batch, bucket.head
        flags, classes = outgoing.flags[row], group.rules.classes[group.at(row, head)]
        own.score = None
        if group.recent_score is not None:
            own.score = class_score(
                classes, flags, group.recent_score[row, head, outgoing.slot[row]]
            )
        own._rank(state, group, row, head, outgoing.position[row], (flags & classes) != 0, now)
        return own

    def _rank(
        self,
        state: LayerState,
        group: Group,
        row: Tensor,
        head: Tensor,
        position: Tensor,
        in_class: Tensor,
        now: int,
    ) -> None:
        start = state.start[row].long()
        self.position = state.settings.without_outdated(position, now, start)
        self.pinned = state.pinned(row, self.position)
        self.rank = priority(
            group.rules,
            state.settings.scorer,
            group.at(row, head),
            group.windows[row, head],
            self.position,
            self.score,
            votes(state, self.position, now),
            now,
            in_class,
            self.pinned,
        )


def _choose(state: LayerState, held: _Ranked, own: _Ranked, capacity: int) -> tuple[Tensor, Tensor]:
    """The slot ``[S]`` that each segment gives up, and whether it does."""
    rank, own_rank = held.rank, own.rank
    if state.settings.plan.turn_tokens and len(state.turn_starts) > 1:
        rank, own_rank = _spare_small_turns(state, held, own, quota_tokens(state, capacity))
    victim = rank.argmin(1)
    beaten = own_rank >= rank.gather(1, victim[:, None])[:, 0]
    return victim, beaten & (own.rank > -torch.inf)


def _spare_small_turns(
    state: LayerState, held: _Ranked, own: _Ranked, quota: int
) -> tuple[Tensor, Tensor]:
    """Ranks in which the tokens of a turn that holds at most `quota` stand at +inf, unless every
    turn of the segment is as small."""
    turn = state.turn_of(held.position).clamp(min=0)
    own_turn = state.turn_of(own.position).clamp(min=0)[:, None]
    free, own_free = held.rank > -torch.inf, own.rank > -torch.inf
    if held.pinned is not None and own.pinned is not None:
        free, own_free = free & ~held.pinned, own_free & ~own.pinned
    sizes = torch.zeros(len(turn), len(state.turn_starts), dtype=torch.int64, device=turn.device)
    sizes.scatter_add_(1, turn, free.long()).scatter_add_(1, own_turn, own_free.long()[:, None])
    count, own_count = sizes.gather(1, turn), sizes.gather(1, own_turn)[:, 0]
    spared = free & (count <= quota)
    own_spared = own_free & (own_count <= quota)
    all_spared = (spared | ~free).all(1) & (own_spared | ~own_free)
    has_room = (held.rank == -torch.inf).any(1)
    keep = ~(all_spared | has_room)
    rank = held.rank.masked_fill(spared & keep[:, None], torch.inf)
    return rank, own.rank.masked_fill(own_spared & keep, torch.inf)


def _write(
    state: LayerState,
    group: Group,
    outgoing: OutgoingToken,
    slots: Tensor,
    row: Tensor,
    head: Tensor,
    score: Tensor | None,
) -> None:
    center, scale = state.settings.key_constants(slots.device)
    kind = group.store.kind

    def rows_of(part: slice) -> tuple[Tensor, Tensor]:
        key = outgoing.key[row[part], head[part]]
        key = to_code_space(key, head[part], center, scale, kind.k_dtype)
        return key, outgoing.value[row[part], head[part]]

    group.store.write(slots, rows_of, outgoing.position[row], score)
