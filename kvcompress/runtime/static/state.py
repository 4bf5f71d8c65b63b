"""Fixed arrays of one layer of the static cache: their sizes, and the way in and out of them.

Heads with the same storage of keys and values form a `StaticGroup` with flat arrays ``[slots, …]``;
in it, heads of equal slot count that all rank by score, or all do not, form a `Block`, a dense view
``[B, heads, slots, …]``. Slot counts are what `capacity_tokens` grants at the very end, so they
follow from the plan and the numbers that the cache is made with; a row that is granted less now
uses its first slots only. Heads lie in the order of the blocks everywhere, so that a block's part
of any array is a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvcompress.accounting import (
    SCORE_BYTES,
    capacity_tokens,
    keeps_classes,
    keeps_scores,
    layer_shared_bytes,
    sinks_of,
    slot_bytes,
)
from kvcompress.evict.keepset import HeadRules, class_mask
from kvcompress.plan import HeadPlan, KVDtype, Plan
from kvcompress.quant.codec import Codes, has_minimum, row_elements, row_torch_dtype, value_groups
from kvcompress.runtime.store.segments import EMPTY
from kvcompress.runtime.store.state import LayerSettings

SEGMENT_BYTES: Final = 8  # per (row, head): local window and budget
ROW_BYTES: Final = 8  # real tokens, now and when the last prompt ended
CLASS_COUNT_BYTES: Final = 16  # per row, in layers that keep classes
SPAN_BYTES: Final = 8  # per row and protected span: its bounds
LAYER_BYTES: Final = 16  # tokens seen, first vote
NO_CAP: Final = 2**30

RowSpans = Sequence[tuple[range, ...]]  # protected tokens of each row


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the arrays are made for, see `StaticCompressedCache`."""

    batch: int
    max_tokens: int
    prompt_tokens: int

    def slots(self, plan: Plan, layer: int, head: HeadPlan, spans: RowSpans) -> int:
        """Slots of codes that a head needs until `max_tokens`; one that keeps classes without a
        cap needs room for as many class tokens as tokens."""
        exact = sinks_of(plan, layer) + plan.recent_tokens
        classes = max(0, self.max_tokens - exact) if keeps_classes(head) else 0
        numbers = (self.max_tokens, self.prompt_tokens, classes)
        rows = set(spans) or {()}
        return max(capacity_tokens(plan, layer, head, *numbers, row) for row in rows)


def static_cache_bytes(
    plan: Plan,
    batch: int,
    max_tokens: int,
    prompt_tokens: int | None = None,
    spans: RowSpans = (),
) -> int:
    """Bytes of a static cache from its first prompt on, whatever it holds.

    Args:
        max_tokens, prompt_tokens: as for `StaticCompressedCache`.
        spans: protected tokens of each row.
    """
    sizes = Sizes(batch, max_tokens, max_tokens if prompt_tokens is None else prompt_tokens)
    bounds = SPAN_BYTES * max((len(row) for row in spans), default=0)
    shape = plan.model
    vector = (shape.head_dim + shape.v_dim) * shape.model_dtype_bytes
    total = 0
    for layer, heads in enumerate(plan.heads):
        exact = sinks_of(plan, layer) + plan.recent_tokens
        row = ROW_BYTES + bounds + (CLASS_COUNT_BYTES if any(map(keeps_classes, heads)) else 0)
        total += LAYER_BYTES + layer_shared_bytes(plan, layer, batch) + batch * row
        spare: dict[tuple[KVDtype, KVDtype], int] = {}
        for head in heads:
            slot, storage = slot_bytes(head, shape), (head.k_dtype, head.v_dtype)
            spare[storage] = max(slot, spare.get(storage, 0))
            scores = SCORE_BYTES * plan.recent_tokens if keeps_scores(head) else 0
            one = sizes.slots(plan, layer, head, spans) * slot + exact * vector + scores
            total += batch * (one + SEGMENT_BYTES)
        total += sum(spare.values())
    return total


@dataclass(frozen=True, slots=True)
class Block:
    """Heads of a group with the same number of slots.

    Attributes:
        heads: KV head numbers.
        classes: whether one of them keeps token classes.
        first: number of the first one in the order of the state.
        slots: of the group's flat arrays.
    """

    heads: tuple[int, ...]
    scored: bool
    classes: bool
    capacity: int
    first: int
    slots: slice

    @property
    def span(self) -> slice:
        """These heads in the order of the state."""
        return slice(self.first, self.first + len(self.heads))

    def view(self, flat: Tensor) -> Tensor:
        """``[B, heads, capacity, …]`` of a flat array."""
        shape = (-1, len(self.heads), self.capacity, *flat.shape[1:])
        return flat[self.slots].view(shape)


@dataclass(slots=True)
class StaticGroup:
    """Heads of a layer with the same storage; those that rank by score come first.

    The last slot of each array is spare: what no head keeps is written there.

    Attributes:
        keys, values: codes ``[N + 1, …]``.
        position: ``[N + 1]`` int32, −1 where empty.
        score: ``[Ns + 1]`` float32 of the scored heads' slots, or None.
        recent_score: ``[B, Hs, recent]`` float32, or None.
        base: ``[B, Hg]`` int64 first slot of each segment.
    """

    k_dtype: KVDtype
    v_dtype: KVDtype
    blocks: list[Block]
    keys: Codes
    values: Codes
    position: Tensor
    score: Tensor | None
    recent_score: Tensor | None
    base: Tensor

    @property
    def span(self) -> slice:
        return slice(self.blocks[0].first, self.blocks[-1].span.stop)

    @property
    def scored(self) -> slice:
        """The scored heads in the order of the state."""
        first = self.span.start
        return slice(first, first + sum(len(b.heads) for b in self.blocks if b.scored))

    def per_slot(self) -> list[Tensor | None]:
        codes = (self.keys, self.values)
        return [t for c in codes for t in (c.data, c.scale, c.minimum)] + [
            self.position,
            self.score,
        ]

    def row_tensors(self) -> list[Tensor]:
        return [] if self.recent_score is None else [self.recent_score]

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.per_slot(), *self.row_tensors()) if t is not None]

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes old row ``rows[b]``, in place."""
        for block in self.blocks:
            for flat in self.per_slot():
                if flat is not None and block.capacity and (block.scored or flat is not self.score):
                    view = block.view(_bytes(flat))
                    view.copy_(view.index_select(0, rows))
        for tensor in self.row_tensors():
            tensor.copy_(tensor.index_select(0, rows))


def _bytes(t: Tensor) -> Tensor:
    """fp8 as bytes, which every operation can move."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


@dataclass(slots=True)
class StaticState:
    """Tensors of one layer, allocated once; every change afterwards is in place.

    Attributes:
        exact_k, exact_v, exact_position, exact_class, start: as in `LayerState`.
        row_seen, budget_length: ``[B]`` int32 real tokens, now and when the last prompt ended.
        class_counts: ``[B, 4]`` int32 coded tokens by class flags, or None.
        windows, budget: ``[B, Hkv]`` int32 local window, and slots for neither class tokens nor
            protected ones.
        spans: ``[B, spans, 2]`` int32 bounds of protected tokens, or None.
        counter, first_vote: int64 scalars, tokens seen with padding, and as in `LayerState`.
        heads: ``[Hkv]`` KV head numbers in the order of the state; `restore` undoes the order.
        ordered: whether it is the model's own order.
        positions: that the key constants are for.
        center, scale: ``[Hkv, D]`` key constants.
        capacity, cap: ``[Hkv]`` int32 slots, and most of them that protected tokens leave over.
        class_table: ``[4, Hkv]`` int32, 1 where a token with these flags is of the head's classes.
    """

    settings: LayerSettings
    batch: int
    exact_k: Tensor
    exact_v: Tensor
    exact_position: Tensor
    exact_class: Tensor | None
    start: Tensor
    row_seen: Tensor
    budget_length: Tensor
    class_counts: Tensor | None
    windows: Tensor
    budget: Tensor
    spans: Tensor | None
    counter: Tensor
    first_vote: Tensor
    groups: list[StaticGroup]
    heads: Tensor
    restore: Tensor
    ordered: bool
    positions: int
    center: Tensor
    scale: Tensor
    capacity: Tensor
    cap: Tensor
    class_table: Tensor
    rules: HeadRules

    @staticmethod
    def empty(
        settings: LayerSettings, key: Tensor, value: Tensor, sizes: Sizes, spans: RowSpans
    ) -> StaticState:
        """For keys like `key` ``[B, Hkv, T, D]`` and values ``[B, Hkv, T, Dv]``."""
        batch, heads, _, dim = key.shape
        exact, device = settings.exact_tokens, key.device
        groups = _groups(settings, key, value, sizes, spans)
        blocks = [block for group in groups for block in group.blocks]
        order = [h for block in blocks for h in block.heads]
        plans = [settings.heads[h] for h in order]
        most = max(map(len, spans), default=0)
        positions = settings.positions_for(sizes.max_tokens)
        center, scale = settings.key_constants(device, positions)

        def ints(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        def constant(values: list[Any], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        state = StaticState(
            settings=settings,
            batch=batch,
            exact_k=key.new_zeros(batch, heads, exact, dim),
            exact_v=key.new_zeros(batch, heads, exact, value.shape[-1]),
            exact_position=ints(batch, exact, fill=EMPTY),
            exact_class=ints(batch, exact, dtype=torch.uint8) if settings.uses_classes else None,
            start=ints(batch, fill=EMPTY),
            row_seen=ints(batch),
            budget_length=ints(batch),
            class_counts=ints(batch, 4) if settings.uses_classes else None,
            windows=ints(batch, heads),
            budget=ints(batch, heads),
            spans=ints(batch, most, 2) if most else None,
            counter=ints(dtype=torch.int64),
            first_vote=ints(dtype=torch.int64),
            groups=groups,
            heads=constant(order, torch.int64),
            restore=constant([order.index(h) for h in range(heads)], torch.int64),
            ordered=order == list(range(heads)),
            positions=positions,
            center=center[order],
            scale=scale[order],
            capacity=constant([b.capacity for b in blocks for _ in b.heads]),
            cap=constant([NO_CAP if p.cap is None else p.cap for p in plans]),
            class_table=constant([[int(bool(f & class_mask(p))) for p in plans] for f in range(4)]),
            rules=HeadRules.of(plans, device),
        )
        state._mark_addresses()
        return state

    def _mark_addresses(self) -> None:
        """Tell the compiler that no tensor of the layer ever moves, so CUDA graphs may replay."""
        constants = [self.heads, self.restore, self.center, self.scale]
        constants += [self.capacity, self.cap, self.class_table]
        constants += [self.rules.classes, self.rules.by_score, self.rules.keeps_rest]
        constants += [group.base for group in self.groups]
        for tensor in (*self.tensors(), *constants):
            torch._dynamo.mark_static_address(tensor)

    def _row_tensors(self) -> list[Tensor]:
        """Tensors with one entry per batch row, the groups' aside."""
        held = [self.exact_k, self.exact_v, self.exact_position, self.start]
        held += [self.row_seen, self.budget_length, self.windows, self.budget]
        return held + [
            t for t in (self.exact_class, self.class_counts, self.spans) if t is not None
        ]

    def tensors(self) -> list[Tensor]:
        """Every tensor that this cache alone holds; the plan's constants are not among them."""
        held = [*self._row_tensors(), self.counter, self.first_vote]
        return held + [t for group in self.groups for t in group.tensors()]

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def select_rows(self, rows: Tensor) -> None:
        """Row b becomes old row ``rows[b]``, in place."""
        rows = rows.to(self.start.device)
        for tensor in self._row_tensors():
            tensor.copy_(tensor.index_select(0, rows))
        for group in self.groups:
            group.select_rows(rows)


def _groups(
    settings: LayerSettings, key: Tensor, value: Tensor, sizes: Sizes, spans: RowSpans
) -> list[StaticGroup]:
    """Empty groups in a fixed order."""
    members: dict[tuple[KVDtype, KVDtype], dict[tuple[bool, int], list[int]]] = {}
    for number, head in enumerate(settings.heads):
        slots = sizes.slots(settings.plan, settings.layer, head, spans)
        alike = members.setdefault((head.k_dtype, head.v_dtype), {})
        alike.setdefault((not keeps_scores(head), slots), []).append(number)
    groups = []
    first = 0
    for (k_dtype, v_dtype), alike in members.items():
        blocks, total = [], 0
        for (unscored, slots), heads in sorted(alike.items()):
            stop = total + key.shape[0] * len(heads) * slots
            classes = any(keeps_classes(settings.heads[h]) for h in heads)
            blocks.append(
                Block(tuple(heads), not unscored, classes, slots, first, slice(total, stop))
            )
            first, total = first + len(heads), stop
        groups.append(_group(k_dtype, v_dtype, blocks, settings.recent_tokens, key, value))
    return groups


def _group(
    k_dtype: KVDtype,
    v_dtype: KVDtype,
    blocks: list[Block],
    recent: int,
    key: Tensor,
    value: Tensor,
) -> StaticGroup:
    batch, device = key.shape[0], key.device
    scored = [block for block in blocks if block.scored]
    base = [
        torch.arange(batch * len(b.heads)).view(batch, -1) * b.capacity + b.slots.start
        for b in blocks
    ]
    slots = blocks[-1].slots.stop + 1
    return StaticGroup(
        k_dtype,
        v_dtype,
        blocks,
        _codes(k_dtype, slots, key, 1),
        _codes(v_dtype, slots, value, value_groups(v_dtype, value.shape[-1])),
        torch.full((slots,), EMPTY, dtype=torch.int32, device=device),
        torch.zeros(scored[-1].slots.stop + 1, device=device) if scored else None,
        torch.zeros(batch, sum(len(b.heads) for b in scored), recent, device=device)
        if scored
        else None,
        torch.cat(base, 1).to(device),
    )


def _codes(dtype: KVDtype, slots: int, like: Tensor, groups: int) -> Codes:
    row, element = row_elements(dtype, like.shape[-1]), row_torch_dtype(dtype, like.dtype)
    data = torch.zeros(slots, row, dtype=element, device=like.device)
    if dtype == "model":
        return Codes(data, None, None)
    scale = torch.zeros(slots, groups, dtype=torch.float16, device=like.device)
    return Codes(data, scale, torch.zeros_like(scale) if has_minimum(dtype) else None)
