"""How much chosen query rows of a prompt attend to each key."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.view import Reach, Softmax, VotersView


def prefill_colsum(voters: VotersView, softmax: Softmax, reach: Reach) -> Tensor:
    """Causal column sums of attention weights; of `reach` the window counts.

    Returns:
        ``[B, Hkv, T]`` float32, summed over the query heads of each KV head.
    """
    query, key, lse, position, weight, first = voters
    heads = key.shape[1]
    q = query.float().unflatten(1, (heads, -1)) * softmax.scaling
    logits = q @ key.float().unsqueeze(2).mT
    if softmax.softcap is not None:
        logits = torch.tanh(logits / softmax.softcap) * softmax.softcap
    keys = torch.arange(key.shape[2], device=key.device)
    visible = (keys <= position[:, None]) & (keys >= first[:, None, None])
    if reach.window:
        visible &= keys > position[:, None] - reach.window
    probability = torch.exp(logits - lse.unflatten(1, (heads, -1)).unsqueeze(-1))
    probability = probability.masked_fill(~visible[:, None, None], 0.0)
    return torch.einsum("bhgrt,br->bht", probability, weight)
