"""`row_advance` in Triton: one program per batch row."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import Advanced, ExactView, RoomView, RowsView, RuleView


class _Sizes(NamedTuple):
    exact: Annotated[int, "int32"]
    heads: Annotated[int, "int32"]
    spans: Annotated[int, "int32"]
    exact_tile: Annotated[int, "int32 constant"]
    head_tile: Annotated[int, "int32 constant"]


@triton.jit
def _advance(flags, exact, rows, room, rule, found, sizes):
    i_b = tl.program_id(0).to(tl.int64)
    now = (tl.load(rows.seen) - 1).to(tl.int32)
    own = now >= 0
    if rows.valid is not None:
        own = tl.load(rows.valid + i_b) != 0
    before, start = tl.load(rows.row_seen + i_b), tl.load(rows.start + i_b)
    o_e = tl.arange(0, sizes.exact_tile)
    recent = (o_e >= exact.sinks) & (o_e < sizes.exact)
    p_position = exact.position + i_b * sizes.exact
    held = tl.load(p_position + o_e, mask=recent, other=2147483647)
    held = tl.where(recent, held, 2147483647)
    slot = tl.min(tl.where(held == tl.min(held, 0), o_e, sizes.exact_tile), 0)
    slot = tl.where(before < exact.sinks, before, slot)
    left = tl.where(own, tl.load(p_position + slot), -1)
    left_flags = left * 0
    o_h = tl.arange(0, sizes.head_tile)
    m_h = o_h < sizes.heads
    granted = tl.load(room.budget + i_b * sizes.heads + o_h, mask=m_h, other=0)
    if rows.class_counts is not None:
        left_flags = tl.load(exact.flags + i_b * sizes.exact + slot).to(tl.int32)
        bits = tl.load(rule.bits + o_h, mask=m_h, other=0) & 3
        added = (left >= 0).to(tl.int32)
        p_counts = rows.class_counts + i_b * 4
        for kind in tl.static_range(1, 4):
            count = tl.load(p_counts + kind) + added * (left_flags == kind)
            granted += tl.where((bits & kind) != 0, count, 0)
        count = tl.load(p_counts + left_flags)
        tl.debug_barrier()  # every thread has read the counts
        tl.store(p_counts + left_flags, count + added)
    granted = tl.minimum(granted, tl.load(room.cap + o_h, mask=m_h, other=0))
    after = before + own.to(tl.int32)
    if rule.spans is not None:
        for s in range(0, sizes.spans):
            p_span = rule.spans + (i_b * sizes.spans + s) * 2
            low = tl.maximum(tl.load(p_span), exact.sinks)
            high = tl.minimum(tl.load(p_span + 1), after - (sizes.exact - exact.sinks))
            granted += tl.maximum(high - low, 0)
    granted = tl.minimum(granted, tl.load(room.capacity + o_h, mask=m_h, other=0))
    tl.store(found.granted + i_b * sizes.heads + o_h, granted, mask=m_h)
    tl.store(found.notes + i_b * 3, slot.to(tl.int64))
    tl.store(found.notes + i_b * 3 + 1, left.to(tl.int64))
    tl.store(found.notes + i_b * 3 + 2, left_flags.to(tl.int64))
    tl.debug_barrier()  # every thread has read what is overwritten now
    tl.store(rows.row_seen + i_b, after)
    tl.store(rows.start + i_b, tl.where((start < 0) & own, now, start))
    tl.store(p_position + slot, now, mask=own)
    if exact.flags is not None:
        token = tl.zeros((), tl.uint8)
        if flags is not None:
            token = tl.load(flags + i_b)
        tl.store(exact.flags + i_b * sizes.exact + slot, token, mask=own)


def row_advance(
    flags: Tensor | None, exact: ExactView, rows: RowsView, room: RoomView, rule: RuleView
) -> Advanced:
    """As `kvcompress.kernels.row_advance.reference.row_advance`."""
    batch, held = exact.position.shape
    heads = room.budget.shape[1]
    found = Advanced(rows.seen.new_empty(batch, 3), room.budget.new_empty(batch, heads))
    spans = 0 if rule.spans is None else rule.spans.shape[1]
    powers = triton.next_power_of_2(held), triton.next_power_of_2(heads)
    views = (exact, rows, room, rule, found, _Sizes(held, heads, spans, *powers))
    _advance[(batch,)](flags, *map(told, views), num_warps=1)
    return found
