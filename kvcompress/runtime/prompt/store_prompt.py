"""Taking tokens into a layer: sinks, recent tokens, and codes for what the keep rule chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.keepset import class_score, place_in_run, priority, turn_quota
from kvcompress.runtime.prompt.attention_inputs import NOTHING, AttentionInputs, finish_scores
from kvcompress.runtime.prompt.choose import Candidates, chosen_keep_sets, granted_tokens
from kvcompress.runtime.prompt.prompt_kernels import encode_kept
from kvcompress.runtime.store.attend import Chunk, first_positions
from kvcompress.runtime.store.segments import EMPTY, Group, in_spans, place_segments
from kvcompress.runtime.store.state import LayerState


class Pool:
    """Recent tokens and the chunk side by side, ``[B, recent + T]``: what may enter the codes.

    Attributes:
        position: int64, −1 for padding, empty slots and tokens that became sinks.
        flags: class flags int64.
        leaving: bool, tokens that are older than the newest `recent` ones.
        is_first: no token came before the chunk's.
    """

    def __init__(self, state: LayerState, chunk: Chunk, taken: Tensor) -> None:
        batch, length = taken.shape
        own = torch.arange(chunk.first, chunk.first + length, device=taken.device)
        own = own.expand(batch, length).masked_fill(taken, EMPTY)
        self.key, self.value = chunk.key, chunk.value
        self.is_first = not any(state.row_seen)
        self.position = torch.cat([state.exact_position[:, state.recent].long(), own], 1)
        flags = torch.zeros_like(own) if chunk.flags is None else chunk.flags.long()
        before = (
            torch.zeros_like(self.position[:, : -length or None])
            if state.exact_class is None
            else state.exact_class[:, state.recent].long()
        )
        self.flags = torch.cat([before, flags], 1)
        self.recent_k = state.exact_k[:, :, state.recent]
        self.recent_v = state.exact_v[:, :, state.recent]
        count = state.settings.recent_tokens
        self.newest = self.position.topk(count, dim=1).indices.sort(1).values  # [B, recent]
        stays = torch.zeros_like(self.position, dtype=torch.bool).scatter_(1, self.newest, True)
        self.leaving = (self.position >= 0) & ~stays

    def vectors(self, row: Tensor, head: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[N, D]`` of pool tokens, without joining the two sources."""
        count = self.recent_k.shape[2]
        old = index < count
        key = self.key.new_empty(len(row), self.key.shape[-1])
        value = self.value.new_empty(len(row), self.value.shape[-1])
        for where, k, v, shift in (
            (old, self.recent_k, self.recent_v, 0),
            (~old, self.key, self.value, count),
        ):
            at = (row[where], head[where], index[where] - shift)
            key[where], value[where] = k[at], v[at]
        return key, value


def store_prompt(
    state: LayerState,
    chunk: Chunk,
    scores: dict[int, Tensor],
    attention_inputs: AttentionInputs = NOTHING,
) -> None:
    """Take a chunk's keys in, after its attention: evict on exact values, then encode once.

    Args:
        scores: per scored group the scores of the chunk's keys ``[B, Hg, P + T]``, after `attend`.
    """
    PromptToStore(state, chunk, scores, attention_inputs).finish()


class PromptToStore:
    """A chunk on its way in: all that may stay is ranked, and what stays is about to be decided.

    Attributes:
        candidates: per group, what its heads choose among.
    """

    def __init__(
        self,
        state: LayerState,
        chunk: Chunk,
        scores: dict[int, Tensor],
        attention_inputs: AttentionInputs,
    ) -> None:
        batch, length = chunk.key.shape[0], chunk.key.shape[2]
        valid = chunk.valid
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=chunk.key.device)
            added = [length] * batch
        else:
            added = valid.sum(1).tolist()
            _refuse_gaps_before_spans(state, valid)
        first = not any(state.row_seen)
        state.start = first_positions(state, chunk)
        taken = ~valid | _fill_sinks(state, chunk, valid)
        self.state, self.pool = state, Pool(state, chunk, taken)
        now = chunk.first + length - 1
        state.row_seen = [seen + new for seen, new in zip(state.row_seen, added, strict=True)]
        state.budget_length = list(state.row_seen)
        if length > 1:
            leaving = self.pool.leaving[:, -length:]
            scores = finish_scores(state, chunk, scores, attention_inputs, leaving)
        self.scores = scores
        if first and state.settings.chosen_by_head:
            state.grant(chosen_keep_sets(state, chunk, self.scores))
        state.resolve_windows()
        if state.settings.uses_classes:
            _count_classes(state, self.pool)
        self.candidates = [
            _candidates(state, group, self.pool, self.scores.get(number), now)
            for number, group in enumerate(state.groups)
        ]
        self._prompt = length > 1

    def finish(self, granted: list[list[int]] | None = None) -> None:
        """Keep the best.

        Args:
            granted: ``granted[row][head]`` tokens of the `frequent` budgets; None is as the plan's
                rule finds in this layer alone.
        """
        if granted is None and self._prompt:
            granted = granted_tokens(self.state, self.candidates)
        if granted is not None:
            self.state.grant(granted)
        for group, found in zip(self.state.groups, self.candidates, strict=True):
            _keep_best(self.state, group, self.pool, found)
        _move_recent(self.state, self.pool, self.scores)


def _refuse_gaps_before_spans(state: LayerState, valid: Tensor) -> None:
    """Protected tokens are found by their distance from the row's start: padding may only lead."""
    for row, spans in enumerate(state.spans):
        if not spans or max(s.stop for s in spans) <= state.row_seen[row]:
            continue
        real = valid[row].nonzero()
        first = int(real[0]) if len(real) and not state.row_seen[row] else 0
        if not bool(valid[row, first:].all()):
            raise KVCompressError(
                f"row {row}: padding stands before the end of a protected span; pad on the left "
                "of the first prompt only, or protect tokens of the first prompt"
            )


def _fill_sinks(state: LayerState, chunk: Chunk, valid: Tensor) -> Tensor:
    """Put the row's first tokens into its free sink slots; True for those tokens, ``[B, T]``."""
    sinks = state.settings.sink_tokens
    seen = torch.tensor(state.row_seen, device=valid.device)
    slot = seen[:, None] + valid.cumsum(1) - 1
    into = valid & (slot < sinks)
    row, index = into.nonzero(as_tuple=True)
    if len(row):
        target = slot[row, index]
        state.exact_k[row, :, target] = chunk.key[row, :, index]
        state.exact_v[row, :, target] = chunk.value[row, :, index]
        state.exact_position[row, target] = (index + chunk.first).to(torch.int32)
    return into


def _count_classes(state: LayerState, pool: Pool) -> None:
    for flags in (1, 2, 3):
        counts = ((pool.flags == flags) & pool.leaving).sum(1).tolist()
        for row, count in enumerate(counts):
            state.class_counts[row][flags] += count


def _candidates(
    state: LayerState, group: Group, pool: Pool, chunk_score: Tensor | None, now: int
) -> Candidates:
    """The stored tokens of a group's heads, and then the leaving ones."""
    store, members = group.store, len(group.heads)
    row, head, index = _leaving(pool, members)
    old_row, old_head = store.segment_of_slot()
    all_row, all_head = torch.cat([old_row, row]), torch.cat([old_head, head])
    position = torch.cat([store.position.long(), pool.position[row, index]])
    flags, classes = pool.flags[row, index], group.rules.classes
    own_classes = classes[group.at(row, head)]
    score = in_class = None
    if store.score is not None and chunk_score is not None and group.recent_score is not None:
        joined = torch.cat([group.recent_score, chunk_score], 2)
        new_score = class_score(own_classes, flags, joined[row, head, index])
        score = torch.cat([store.score, new_score])
    else:  # a head that keeps classes without scores never evicts what it took in
        old = ((classes != 0) & ~group.rules.keeps_rest)[group.at(old_row, old_head)]
        in_class = torch.cat([old, (flags & own_classes) != 0])
    position = state.settings.without_outdated(position, now, state.start[all_row].long())
    bounds, pinned = state.span_bounds(), None
    if bounds is not None:
        pinned = in_spans(position - state.start[all_row], bounds[all_row])
    rank = priority(
        group.rules,
        state.settings.scorer,
        group.at(all_row, all_head),
        group.windows[all_row, all_head],
        position,
        score,
        votes(state, position, now),
        now,
        in_class,
        pinned,
    )
    return Candidates(all_row, all_head, position, rank, score, pinned, old_row.shape[0], index)


def _keep_best(state: LayerState, group: Group, pool: Pool, found: Candidates) -> None:
    """Lay the store out anew with the best of the candidates, and encode the new ones."""
    store, members = group.store, len(group.heads)
    capacities = state.capacities(group)
    segment = found.row * members + found.head
    tier = _turn_tier(state, found.rank, segment, found.position, found.pinned, capacities)
    kept, place = _best(segment, found.rank, tier, found.position, capacities)
    is_old = kept < found.stored
    _, starts = place_segments(capacities)
    start = torch.tensor(starts, device=kept.device).flatten()
    slots = start[found.row[kept] * members + found.head[kept]] + place
    store.rebuild(capacities, kept[is_old], slots[is_old])
    new = kept[~is_old]
    fresh = found.index[new - found.stored]
    fresh_row, fresh_head = found.row[new], group.index[found.head[new]]
    center, scale = state.key_constants()
    slots, position = slots[~is_old], found.position[new]
    score = None if found.score is None else found.score[new]
    if pool.is_first and store.notes is None:
        kept = torch.stack([fresh_row, fresh_head, fresh - pool.recent_k.shape[2]])
        if encode_kept(pool.key, pool.value, kept, slots, (center, scale), store):
            store.describe(slots, position, score)
            return

    def rows_of(part: slice) -> tuple[Tensor, Tensor]:
        heads = fresh_head[part]
        key, value = pool.vectors(fresh_row[part], heads, fresh[part])
        return to_code_space(key, heads, center, scale, store.kind.k_dtype), value

    store.write(slots, rows_of, position, score)


def to_code_space(key: Tensor, heads: Tensor, center: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Keys ``[N, D]`` minus their head's centre, divided by its scale, in float32."""
    return (key.float() - center[heads]) / scale[heads]


def votes(state: LayerState, position: Tensor, now: int) -> Tensor:
    """How many query rows have voted on a token."""
    return now + 1 - position.clamp(min=state.first_vote)


def _leaving(pool: Pool, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, head in group, pool index) of every (token, head) to be coded or dropped."""
    row, index = pool.leaving.nonzero(as_tuple=True)
    head = torch.arange(heads, device=row.device).repeat_interleave(len(row))
    return row.repeat(heads), head, index.repeat(heads)


def _turn_tier(
    state: LayerState,
    rank: Tensor,
    segment: Tensor,
    position: Tensor,
    pinned: Tensor | None,
    capacities: list[list[int]],
) -> Tensor | None:
    """`turn_quota` of every candidate, None where the plan has no quota."""
    turns = len(state.turn_starts)
    if not state.settings.plan.turn_tokens or turns < 2:
        return None
    quota = torch.tensor(
        [quota_tokens(state, c) for row in capacities for c in row], device=rank.device
    )
    turn = state.turn_of(position)
    return turn_quota(rank, segment, turn, quota[segment], pinned)


def quota_tokens(state: LayerState, capacity: int) -> int:
    """Tokens that every turn keeps in a segment of `capacity` slots."""
    return min(state.settings.plan.turn_tokens, capacity // max(1, len(state.turn_starts)))


def _best(
    segment: Tensor,
    rank: Tensor,
    tier: Tensor | None,
    position: Tensor,
    capacities: list[list[int]],
) -> tuple[Tensor, Tensor]:
    """The candidates that each segment keeps: by tier, then by rank.

    Returns:
        Their indices, ordered by segment and position, and the place of each inside its segment.
    """
    room = torch.tensor([c for row in capacities for c in row], device=segment.device)
    order = rank.argsort(descending=True, stable=True)
    if tier is not None:
        order = order[tier[order].argsort(descending=True, stable=True)]
    order = order[segment[order].argsort(stable=True)]
    kept = order[(place_in_run(segment[order]) < room[segment[order]]) & (rank[order] > -torch.inf)]
    kept = kept[position[kept].argsort(stable=True)]
    kept = kept[segment[kept].argsort(stable=True)]
    return kept, place_in_run(segment[kept])


def _move_recent(state: LayerState, pool: Pool, scores: dict[int, Tensor]) -> None:
    """The pool's newest tokens become the recent ones."""
    batch, heads = state.exact_k.shape[:2]
    count = state.settings.recent_tokens
    row = torch.arange(batch, device=pool.newest.device)[:, None, None].expand(-1, heads, count)
    head = torch.arange(heads, device=row.device)[None, :, None].expand_as(row)
    index = pool.newest[:, None, :].expand_as(row)
    key, value = pool.vectors(row.reshape(-1), head.reshape(-1), index.reshape(-1))
    for number, group in enumerate(state.groups):
        if group.recent_score is not None:
            joined = torch.cat([group.recent_score, scores[number]], 2)
            where = pool.newest[:, None, :].expand(-1, len(group.heads), -1)
            group.recent_score = joined.gather(2, where)
    state.exact_k[:, :, state.recent] = key.reshape(batch, heads, count, -1)
    state.exact_v[:, :, state.recent] = value.reshape(batch, heads, count, -1)
    position = pool.position.gather(1, pool.newest)
    state.exact_position[:, state.recent] = position.to(torch.int32)
    if state.exact_class is not None:
        flags = pool.flags.gather(1, pool.newest)
        state.exact_class[:, state.recent] = flags.to(torch.uint8)
