"""One decoded token per row enters the exact slots: what it displaces, and room in heads."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Enter the token's position and class, and count it; its vectors follow in `kv_append`.

    Args:
        exact_position: ``[B, E]`` int32 of sinks and recent tokens, changed in place, as are
            exact_class ``[B, E]`` uint8, row_seen ``[B]`` int32 real tokens so far, start ``[B]``
            int32 position of the first one or −1, and class_counts ``[B, 4]`` int32 coded tokens
            by class flags.
        seen: int64 scalar, tokens that have come with padding, the new one included.
        valid: ``[B]`` bool, False where it is padding, which changes nothing; or None.
        flags: ``[B]`` uint8 class flags of the token, or None.
        budget: ``[B, H]`` int32 slots for neither class tokens nor protected ones.
        cap, capacity: ``[H]`` int32 most slots without protected tokens, and all slots.
        bits: ``[H]`` int32, see `rule_bits`.
        spans: ``[B, S, 2]`` int32 protected tokens, or None.

    Returns:
        notes ``[B, 3]`` int64: the exact slot that the token takes, and the position (−1: none)
        and class flags of what leaves it; granted ``[B, H]`` int32 slots that may be used.
    """
    batch, exact = exact_position.shape
    now = (seen - 1).to(torch.int32)
    own = torch.ones(batch, dtype=torch.bool, device=start.device) if valid is None else valid
    slot = exact_position[:, sink_tokens:].argmin(1) + sink_tokens
    slot = torch.where(row_seen < sink_tokens, row_seen.long(), slot)[:, None]
    left = exact_position.gather(1, slot)[:, 0].masked_fill(~own, -1)
    left_flags = torch.zeros_like(left)
    if exact_class is not None:
        left_flags = exact_class.gather(1, slot)[:, 0].int()
    granted = budget.clone()
    if class_counts is not None:
        class_counts.scatter_add_(1, left_flags.long()[:, None], (left >= 0).int()[:, None])
        for kind in (1, 2, 3):
            granted += class_counts[:, kind, None] * ((bits & 3 & kind) != 0)
    granted = torch.minimum(granted, cap)
    row_seen += own
    if spans is not None:
        low = spans[..., 0].clamp(min=sink_tokens)
        outside = (row_seen - (exact - sink_tokens))[:, None]
        granted += (torch.minimum(spans[..., 1], outside) - low).clamp(min=0).sum(1, keepdim=True)
    granted = torch.minimum(granted, capacity).int()
    start.copy_(torch.where((start < 0) & own, now, start))
    new = torch.where(own, now, exact_position.gather(1, slot)[:, 0])
    exact_position.scatter_(1, slot, new[:, None])
    if exact_class is not None:
        token = torch.zeros_like(own, dtype=torch.uint8) if flags is None else flags
        kept = torch.where(own, token, exact_class.gather(1, slot)[:, 0])
        exact_class.scatter_(1, slot, kept[:, None])
    return torch.stack([slot[:, 0], left.long(), left_flags.long()], 1), granted


def rule_bits(classes: Tensor, by_score: Tensor, keeps_rest: Tensor, scored: Tensor) -> Tensor:
    """``[H]`` int32: class flags that a head keeps (1, 2), ranks the rest by score (4), has room
    for the rest (8), keeps scores (16)."""
    bits = classes.int() | (by_score.int() << 2) | (keeps_rest.int() << 3) | (scored.int() << 4)
    return bits.int()
