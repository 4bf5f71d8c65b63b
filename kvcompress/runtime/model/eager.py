"""Attention over a plain cache with soft caps or learned sinks, which sdpa cannot compute."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[B, T, Hq, D]`` from ``[B, Hq, T, D]`` and ``[B, Hkv, S, D]``, in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q.float() @ k.float().mT) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    weight = logits.softmax(-1)[..., : k.shape[2]]
    return (weight @ v.float()).to(q.dtype).transpose(1, 2).contiguous()
