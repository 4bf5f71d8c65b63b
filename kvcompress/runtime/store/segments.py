"""Ragged storage of one group of heads: flat arrays, a segment per (batch row, KV head).

Heads of a layer that share key storage, value storage and the need for scores form a group. Their
segments lie in flat arrays ``[slots, …]``, sorted by capacity, so that segments of equal capacity
are one dense ``[segments, capacity, …]`` view, a `Bucket`, which the attention reads in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.keepset import HeadRules
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import (
    Codes,
    decode,
    encode,
    has_minimum,
    rounded,
    row_elements,
    row_torch_dtype,
    value_groups,
)

EMPTY: Final = -1
_ENCODE_ROWS: Final = 4096  # widened to float32 at a time: small beside a layer of a long prompt


def place_segments(capacities: list[list[int]]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Segments ``(row, head)`` in the order of their capacity, and where each one starts."""
    order = [(c, b, h) for b, row in enumerate(capacities) for h, c in enumerate(row)]
    order.sort()
    starts = [[0] * len(row) for row in capacities]
    total = 0
    for capacity, b, h in order:
        starts[b][h] = total
        total += capacity
    return [(b, h) for _, b, h in order], starts


@dataclass(frozen=True, slots=True)
class StorageKind:
    """What the heads of a group share."""

    k_dtype: KVDtype
    v_dtype: KVDtype
    scored: bool


@dataclass(slots=True)
class Bucket:
    """Segments of equal capacity, as views into the flat arrays of a store.

    Attributes:
        start: first flat slot.
        batch, head: ``[S]`` int64, the row and the head (index inside the group) of each segment.
        keys, values: codes ``[S, C, …]``.
        position: ``[S, C]`` int32, −1 where empty.
        score: ``[S, C]`` float32, +inf for a protected token, or None.
    """

    start: int
    capacity: int
    batch: Tensor
    head: Tensor
    keys: Codes
    values: Codes
    position: Tensor
    score: Tensor | None


# keys, values, positions and scores of a layout
_Arrays = tuple[Codes, Codes, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Overwritten:
    """What lay in flat slots before something was written there."""

    slots: Tensor
    keys: Codes
    values: Codes
    position: Tensor


@dataclass(slots=True)
class SegmentStore:
    """See the module docstring.

    Attributes:
        notes: where `note` leaves what is about to be overwritten, None to leave nothing.
        capacities: host copy, ``capacities[row][head]`` in slots.
        batch_index, head_index: ``[segments]`` int64 in the order in which segments lie.
    """

    kind: StorageKind
    head_dim: int
    value_dim: int
    model_dtype: torch.dtype
    device: torch.device
    capacities: list[list[int]] = field(default_factory=list)
    batch_index: Tensor = field(init=False)
    head_index: Tensor = field(init=False)
    starts: list[list[int]] = field(init=False)
    keys: Codes = field(init=False)
    values: Codes = field(init=False)
    position: Tensor = field(init=False)
    score: Tensor | None = field(init=False)
    notes: list[Overwritten] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._lay_out(self.capacities)

    # ---- layout
    def place(self, capacities: list[list[int]]) -> None:
        """Where segments of `capacities` lie; the arrays are someone else's work."""
        order, self.starts = place_segments(capacities)
        self.capacities = [list(row) for row in capacities]
        index = torch.tensor(order, dtype=torch.int64).reshape(-1, 2)
        self.batch_index = index[:, 0].clone().to(self.device)
        self.head_index = index[:, 1].clone().to(self.device)

    def _lay_out(self, capacities: list[list[int]]) -> None:
        """Fresh, empty arrays for `capacities`."""
        self.place(capacities)
        total = sum(map(sum, capacities))
        self.keys = self._empty_codes(self.kind.k_dtype, total, self.head_dim, 1)
        groups = value_groups(self.kind.v_dtype, self.value_dim)
        self.values = self._empty_codes(self.kind.v_dtype, total, self.value_dim, groups)
        self.position = torch.full((total,), EMPTY, dtype=torch.int32, device=self.device)
        self.score = torch.zeros(total, device=self.device) if self.kind.scored else None

    def _empty_codes(self, dtype: KVDtype, slots: int, dim: int, groups: int) -> Codes:
        row = row_elements(dtype, dim)
        element = row_torch_dtype(dtype, self.model_dtype)
        data = torch.zeros(slots, row, dtype=element, device=self.device)
        if dtype == "model":
            return Codes(data, None, None)

        def meta() -> Tensor:
            return torch.zeros(slots, groups, dtype=torch.float16, device=self.device)

        return Codes(data, meta(), meta() if has_minimum(dtype) else None)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the store holds."""
        held = [self.batch_index, self.head_index, self.position, self.score]
        for codes in (self.keys, self.values):
            held += [codes.data, codes.scale, codes.minimum]
        return [t for t in held if t is not None]

    def buckets(self) -> Iterator[Bucket]:
        """Views of all segments that have slots."""
        flat = [c for row in self.capacities for c in row]
        low, start = 0, 0
        for capacity in sorted(set(flat)):
            high = low + flat.count(capacity)
            stop = start + (high - low) * capacity
            if capacity:
                yield self._bucket(capacity, slice(low, high), slice(start, stop))
            low, start = high, stop

    def _bucket(self, capacity: int, segments: slice, slots: slice) -> Bucket:
        def view(t: Tensor) -> Tensor:
            return t[slots].unflatten(0, (-1, capacity))

        return Bucket(
            slots.start,
            capacity,
            self.batch_index[segments],
            self.head_index[segments],
            self.keys.each(view),
            self.values.each(view),
            view(self.position),
            None if self.score is None else view(self.score),
        )

    def segment_of_slot(self) -> tuple[Tensor, Tensor]:
        """(row, head) of every flat slot, int64."""
        order = [
            self.capacities[b][h]
            for b, h in zip(self.batch_index.tolist(), self.head_index.tolist(), strict=True)
        ]
        repeats = torch.tensor(order, device=self.device)
        return self.batch_index.repeat_interleave(repeats), self.head_index.repeat_interleave(
            repeats
        )

    def decoded(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Keys (still centred and scaled) and values ``[S, C, …]`` of a bucket, float32."""
        return (
            decode(bucket.keys, self.kind.k_dtype, self.head_dim),
            decode(bucket.values, self.kind.v_dtype, self.value_dim),
        )

    # ---- moves
    def relayout(self, capacities: list[list[int]], source_rows: list[int] | None = None) -> None:
        """New capacities; row b continues old row `source_rows[b]`. What a smaller segment has no
        room for is lost: its last slots."""
        rows = source_rows if source_rows is not None else list(range(len(capacities)))
        old = (self.keys, self.values, self.position, self.score)
        old_starts, old_capacities = self.starts, self.capacities
        self._lay_out(capacities)
        moves = [
            (old_starts[rows[b]][h], self.starts[b][h], min(row[h], old_capacities[rows[b]][h]))
            for b, row in enumerate(capacities)
            for h in range(len(row))
        ]
        for before, after in self._pairs(old):
            for source, target, count in moves:  # whole runs: several times faster than an index
                after[target : target + count] = before[source : source + count]

    def rebuild(self, capacities: list[list[int]], kept: Tensor, target: Tensor) -> None:
        """New layout that holds only the old slots `kept`, at the new flat slots `target`."""
        old = (self.keys, self.values, self.position, self.score)
        self._lay_out(capacities)
        self._copy(old, kept, target)

    def _copy(self, old: _Arrays, source: Tensor, target: Tensor) -> None:
        for before, after in self._pairs(old):
            after[target] = before[source]

    def _pairs(self, old: _Arrays) -> list[tuple[Tensor, Tensor]]:
        """Arrays of an old layout beside those of this one."""
        keys, values, position, score = old
        pairs = [(position, self.position), (score, self.score)]
        for before, after in ((keys, self.keys), (values, self.values)):
            pairs += [
                (before.data, after.data),
                (before.scale, after.scale),
                (before.minimum, after.minimum),
            ]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def write(
        self,
        slots: Tensor,
        rows_of: Callable[[slice], tuple[Tensor, Tensor]],
        position: Tensor,
        score: Tensor | None,
    ) -> None:
        """Encode vectors into flat `slots`, overwriting what was there.

        Args:
            slots: ``[N]`` int64.
            rows_of: gives keys and values ``[n, D]`` (keys already centred and scaled) of a slice
                of the N tokens, so that only a slice of them is widened at a time.
            position: ``[N]``.
            score: ``[N]``, needed where the store keeps scores.
        """
        self.note(slots)
        groups = value_groups(self.kind.v_dtype, self.value_dim)
        for low in range(0, slots.shape[0], _ENCODE_ROWS):
            part = slice(low, min(slots.shape[0], low + _ENCODE_ROWS))
            k, v = rows_of(part)
            put_codes(self.keys, encode(k, self.kind.k_dtype), slots[part])
            put_codes(self.values, encode(v, self.kind.v_dtype, groups), slots[part])
        self.describe(slots, position, score)

    def put(
        self, slots: Tensor, codes: tuple[Codes, Codes], position: Tensor, score: Tensor | None
    ) -> None:
        """Codes of keys and values over what lies in flat `slots`; the rest as for `write`."""
        self.note(slots)
        put_codes(self.keys, codes[0], slots)
        put_codes(self.values, codes[1], slots)
        self.describe(slots, position, score)

    def describe(self, slots: Tensor, position: Tensor, score: Tensor | None) -> None:
        """Positions and scores ``[N]`` of what lies in `slots`, as for `write`."""
        self.position[slots] = position.to(torch.int32)
        if self.score is not None and score is not None:
            self.score[slots] = score

    def note(self, slots: Tensor) -> None:
        """Leave a note of what lies in flat `slots` ``[N]``, where notes are wanted."""
        if self.notes is None:
            return
        keys, values = (codes.each(lambda t: t[slots]) for codes in (self.keys, self.values))
        self.notes.append(Overwritten(slots, keys, values, self.position[slots]))

    def restore(self, before: Overwritten) -> None:
        """Undo one `write`; scores aside."""
        put_codes(self.keys, before.keys, before.slots)
        put_codes(self.values, before.values, before.slots)
        self.position[before.slots] = before.position


def put_codes(target: Codes, source: Codes, slots: Tensor) -> None:
    """Codes ``[*N, …]`` to the flat slots ``[N]``, in place. Vectors that are stored uncoded may
    come in float32."""
    parts = zip(
        (target.data, target.scale, target.minimum),
        (source.data, source.scale, source.minimum),
        strict=True,
    )
    for held, new in parts:
        if held is None or new is None:
            continue
        new = new if new.dtype == held.dtype else rounded(new, held.dtype)
        if held.dtype == torch.float8_e4m3fn:  # as bytes, which every operation can move
            held, new = held.view(torch.uint8), new.view(torch.uint8)
        held.index_copy_(0, slots, new.reshape(-1, *held.shape[1:]))


@dataclass(slots=True)
class Group:
    """Heads of a layer that share storage.

    Attributes:
        heads: KV head numbers; `index` is the same as a tensor.
        recent_score: ``[B, Hg, recent]`` float32 scores of the recent tokens, or None.
        windows: ``[B, Hg]`` int32 local window in tokens.
    """

    heads: list[int]
    index: Tensor
    rules: HeadRules
    store: SegmentStore
    windows: Tensor
    recent_score: Tensor | None

    def at(self, row: Tensor, head: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Index into `rules` of a row and a head, the same for every row or each its own."""
        return head if self.rules.classes.ndim == 1 else (row, head)


def in_spans(number: Tensor, bounds: Tensor) -> Tensor:
    """Which tokens lie in a protected span.

    Args:
        number: of tokens, from their row's first real one.
        bounds: ``[..., spans, 2]``, broadcastable to `number` and the spans.
    """
    number = number.unsqueeze(-1)
    return ((number >= bounds[..., 0]) & (number < bounds[..., 1])).any(-1)
