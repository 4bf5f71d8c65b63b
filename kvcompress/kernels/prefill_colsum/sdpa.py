"""The framework's own attention kernel with what it knows beside the output: its normalisers."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def attention_with_normaliser(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Causal attention of a prompt by the very kernel that `scaled_dot_product_attention` runs.

    Args:
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, T, D]``.
        mask: ``[B, 1, T, T]`` bool, True where a query sees a key; None is causal.

    Returns:
        Output ``[B, T, Hq, D]`` contiguous, and log Σ exp of each row's logits ``[B, Hq, T]``
        float32; None where the framework has no such kernel for these tensors.
    """
    if value.shape[-1] != query.shape[-1] or query.shape[2] != key.shape[2]:
        return None
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        return None
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, mask, scaling)
    if query.device.type == "cuda" and query.dtype in _HALF and mask is None:
        return _on_cuda(query, key, value, scaling)
    return None


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Row by row, with the heads of a group as views: keys are not repeated in memory."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty(batch, length, heads, dim)
    normaliser = query.new_empty(batch, heads, length, dtype=torch.float32)
    for row in range(batch):
        seen = None
        if mask is not None:
            own = mask[row : row + 1]
            seen = torch.zeros_like(own, dtype=query.dtype).masked_fill_(~own, -torch.inf)
        shape = (kv_heads, heads // kv_heads, length, dim)
        found, known = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[row].unflatten(0, shape[:2]),
            key[row, :, None].expand(shape),
            value[row, :, None].expand(shape),
            0.0,
            mask is None,
            attn_mask=seen,
            scale=scaling,
        )
        out[row] = found.flatten(0, 1).transpose(0, 1)
        normaliser[row] = known.flatten(0, 1)
    return out, normaliser


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Flash attention, which reads grouped heads as they are."""
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return None
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, False, scale=scaling
    )
    return found[0].transpose(1, 2).contiguous(), found[1]
