"""Digests: vectors that stand for a block of keys in host memory and rank it for recall.

``minmax``  the smallest and the largest key of every channel. Σ_d max(q_d·min_d, q_d·max_d) is an
            upper bound of q·k over the keys of the block (Quest, arXiv 2406.10774, equation 2).
``mean``    the mean key (InfLLM, arXiv 2402.04617, names it as close to its representative tokens).

Differs from InfLLM: there a block is ranked by a few representative tokens, for all heads at once.
Here every KV head ranks by its own digests and brings back its own blocks.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.plan import DigestName

VECTORS: Final[dict[DigestName, int]] = {"minmax": 2, "mean": 1}


def digest_of(keys: Tensor, kind: DigestName) -> Tensor:
    """Digest ``[..., vectors, D]`` of keys ``[..., tokens, D]``."""
    if kind == "mean":
        return keys.mean(-2, keepdim=True)
    return torch.stack([keys.amin(-2), keys.amax(-2)], -2)


def query_parts(query: Tensor, kind: DigestName) -> tuple[Tensor, ...]:
    """Parts ``[..., D]`` of queries, one for each vector of a digest. A block's rank for a query is
    the sum over vectors of part · vector."""
    return (query,) if kind == "mean" else (query.clamp(max=0), query.clamp(min=0))


def best_blocks(score: Tensor, blocks: Tensor, most: int) -> Tensor:
    """Which blocks each query row of each KV head recalls.

    Args:
        score: ``[B, Hkv, G, n, E]`` of every query head of a KV head; the group ranks a block by
            their mean.
        blocks: ``[B]`` blocks that each row has; later ones are empty.
        most: blocks that a query row recalls.

    Returns:
        ``[B, Hkv, n, E]`` bool.
    """
    there = torch.arange(score.shape[-1], device=score.device) < blocks[:, None]
    there = there[:, None, None, :]
    best = score.mean(2).masked_fill(~there, -torch.inf)
    chosen = best.topk(min(most, score.shape[-1]), -1).indices
    return torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True) & there
