"""How much chosen query rows of a prompt attend to each key."""

from __future__ import annotations

import torch
from torch import Tensor


def prefill_colsum(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    position: Tensor,
    weight: Tensor,
    first: Tensor,
    scaling: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Causal column sums of attention weights.

    Args:
        query: ``[B, Hq, R, D]`` the chosen rows; key: ``[B, Hkv, T, D]``.
        lse: ``[B, Hq, R]`` float32, log of each row's softmax sum over all that it sees.
        position: ``[R]`` int64, the last key that a row sees.
        weight: ``[B, R]`` float32, of a row's attention; 0 for padding.
        first: ``[B]`` int64, the first key that is no padding.
        scaling, softcap, window: of the attention; 0 is none.

    Returns:
        ``[B, Hkv, T]`` float32, summed over the query heads of each KV head.
    """
    heads = key.shape[1]
    q = query.float().unflatten(1, (heads, -1)) * scaling
    logits = q @ key.float().unsqueeze(2).mT
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    keys = torch.arange(key.shape[2], device=key.device)
    visible = (keys <= position[:, None]) & (keys >= first[:, None, None])
    if window:
        visible &= keys > position[:, None] - window
    probability = torch.exp(logits - lse.unflatten(1, (heads, -1)).unsqueeze(-1))
    probability = probability.masked_fill(~visible[:, None, None], 0.0)
    return torch.einsum("bhgrt,br->bht", probability, weight)
