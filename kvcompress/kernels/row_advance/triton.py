"""`row_advance` in Triton: one program per batch row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _advance(
    POS, CLASS, SEEN_ROW, START, COUNTS, SEEN, VALID, FLAGS, BUDGET, CAP, CAPACITY, BITS, SPANS,
    NOTES, GRANTED, sinks, exact, heads, spans, EP: tl.constexpr, HP: tl.constexpr,
    CLASSES: tl.constexpr, HAS_VALID: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_SPANS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    now = (tl.load(SEEN) - 1).to(tl.int32)
    own = now >= 0
    if HAS_VALID:
        own = tl.load(VALID + i_b) != 0
    before, start = tl.load(SEEN_ROW + i_b), tl.load(START + i_b)
    o_e = tl.arange(0, EP)
    recent = (o_e >= sinks) & (o_e < exact)
    held = tl.load(POS + i_b * exact + o_e, mask=recent, other=2147483647)
    held = tl.where(recent, held, 2147483647)
    slot = tl.min(tl.where(held == tl.min(held, 0), o_e, EP), 0)
    slot = tl.where(before < sinks, before, slot)
    left = tl.where(own, tl.load(POS + i_b * exact + slot), -1)
    left_flags = left * 0
    o_h = tl.arange(0, HP)
    m_h = o_h < heads
    granted = tl.load(BUDGET + i_b * heads + o_h, mask=m_h, other=0)
    if CLASSES:
        left_flags = tl.load(CLASS + i_b * exact + slot).to(tl.int32)
        bits = tl.load(BITS + o_h, mask=m_h, other=0) & 3
        added = (left >= 0).to(tl.int32)
        for kind in tl.static_range(1, 4):
            count = tl.load(COUNTS + i_b * 4 + kind) + added * (left_flags == kind)
            granted += tl.where((bits & kind) != 0, count, 0)
        count = tl.load(COUNTS + i_b * 4 + left_flags)
        tl.debug_barrier()  # every thread has read the counts
        tl.store(COUNTS + i_b * 4 + left_flags, count + added)
    granted = tl.minimum(granted, tl.load(CAP + o_h, mask=m_h, other=0))
    after = before + own.to(tl.int32)
    if HAS_SPANS:
        for s in range(0, spans):
            low = tl.maximum(tl.load(SPANS + (i_b * spans + s) * 2), sinks)
            high = tl.minimum(tl.load(SPANS + (i_b * spans + s) * 2 + 1), after - (exact - sinks))
            granted += tl.maximum(high - low, 0)
    granted = tl.minimum(granted, tl.load(CAPACITY + o_h, mask=m_h, other=0))
    tl.store(GRANTED + i_b * heads + o_h, granted, mask=m_h)
    tl.store(NOTES + i_b * 3, slot.to(tl.int64))
    tl.store(NOTES + i_b * 3 + 1, left.to(tl.int64))
    tl.store(NOTES + i_b * 3 + 2, left_flags.to(tl.int64))
    tl.debug_barrier()  # every thread has read what is overwritten now
    tl.store(SEEN_ROW + i_b, after)
    tl.store(START + i_b, tl.where((start < 0) & own, now, start))
    tl.store(POS + i_b * exact + slot, now, mask=own)
    if CLASSES:
        token = tl.zeros((), tl.uint8)
        if HAS_FLAGS:
            token = tl.load(FLAGS + i_b)
        tl.store(CLASS + i_b * exact + slot, token, mask=own)


def row_advance(
    exact_position: Tensor,
    exact_class: Tensor | None,
    row_seen: Tensor,
    start: Tensor,
    class_counts: Tensor | None,
    seen: Tensor,
    valid: Tensor | None,
    flags: Tensor | None,
    budget: Tensor,
    cap: Tensor,
    capacity: Tensor,
    bits: Tensor,
    spans: Tensor | None,
    sink_tokens: int,
) -> tuple[Tensor, Tensor]:
    """As `kvcompress.kernels.row_advance.reference.row_advance`."""
    batch, exact = exact_position.shape
    heads = budget.shape[1]
    notes = seen.new_empty(batch, 3)
    granted = budget.new_empty(batch, heads)
    _advance[(batch,)](
        exact_position,
        exact_position if exact_class is None else exact_class,
        row_seen,
        start,
        row_seen if class_counts is None else class_counts,
        seen,
        seen if valid is None else valid,
        seen if flags is None else flags,
        budget,
        cap,
        capacity,
        bits,
        seen if spans is None else spans,
        notes,
        granted,
        sink_tokens,
        exact,
        heads,
        0 if spans is None else spans.shape[1],
        EP=triton.next_power_of_2(exact),
        HP=triton.next_power_of_2(heads),
        CLASSES=class_counts is not None,
        HAS_VALID=valid is not None,
        HAS_FLAGS=flags is not None,
        HAS_SPANS=spans is not None,
        num_warps=1,
    )
    return notes, granted
