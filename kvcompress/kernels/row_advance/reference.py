"""One decoded token per row enters the exact slots: what it displaces, and room in heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.view import Advanced, ExactView, RoomView, RowsView, RuleView


def row_advance(
    flags: Tensor | None, exact: ExactView, rows: RowsView, room: RoomView, rule: RuleView
) -> Advanced:
    """Enter the token's position and class, and count it; its vectors follow in `kv_append`.

    Args:
        flags: ``[B]`` uint8 class flags of the token, or None.
        exact, rows: positions and flags, and all of `rows` but `seen`, are changed in place.
    """
    batch, held = exact.position.shape
    now = (rows.seen - 1).to(torch.int32)
    own = torch.ones_like(rows.start, dtype=torch.bool) if rows.valid is None else rows.valid
    slot = exact.position[:, exact.sinks :].argmin(1) + exact.sinks
    slot = torch.where(rows.row_seen < exact.sinks, rows.row_seen.long(), slot)[:, None]
    left = exact.position.gather(1, slot)[:, 0].masked_fill(~own, -1)
    left_flags = torch.zeros_like(left)
    if exact.flags is not None:
        left_flags = exact.flags.gather(1, slot)[:, 0].int()
    granted = room.budget.clone()
    if rows.class_counts is not None:
        counted = (left >= 0).int()[:, None]
        rows.class_counts.scatter_add_(1, left_flags.long()[:, None], counted)
        for kind in (1, 2, 3):
            granted += rows.class_counts[:, kind, None] * ((rule.bits & 3 & kind) != 0)
    granted = torch.minimum(granted, room.cap)
    rows.row_seen.add_(own)
    if rule.spans is not None:
        low = rule.spans[..., 0].clamp(min=exact.sinks)
        outside = (rows.row_seen - (held - exact.sinks))[:, None]
        kept = (torch.minimum(rule.spans[..., 1], outside) - low).clamp(min=0)
        granted += kept.sum(1, keepdim=True)
    granted = torch.minimum(granted, room.capacity).int()
    rows.start.copy_(torch.where((rows.start < 0) & own, now, rows.start))
    new = torch.where(own, now, exact.position.gather(1, slot)[:, 0])
    exact.position.scatter_(1, slot, new[:, None])
    if exact.flags is not None:
        token = torch.zeros_like(own, dtype=torch.uint8) if flags is None else flags
        kept = torch.where(own, token, exact.flags.gather(1, slot)[:, 0])
        exact.flags.scatter_(1, slot, kept[:, None])
    return Advanced(torch.stack([slot[:, 0], left.long(), left_flags.long()], 1), granted)


def rule_bits(classes: Tensor, by_score: Tensor, keeps_rest: Tensor, scored: Tensor) -> Tensor:
    """``[H]`` int32: class flags that a head keeps (1, 2), ranks the rest by score (4), has room
    for the rest (8), keeps scores (16)."""
    bits = classes.int() | (by_score.int() << 2) | (keeps_rest.int() << 3) | (scored.int() << 4)
    return bits.int()
