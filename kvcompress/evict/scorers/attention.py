"""Scores that add up attention columns: raw sums, their mean, and lift.

Source: H2O (arXiv 2306.14048) keeps raw sums. Under uniform causal attention the raw sum of token i
of n is H_n − H_i, so early tokens win without being looked at; `mean` divides by the rows that saw
the token and keeps most of that bias; `lift` weighs row q by the q + 1 keys that it shares its
attention over, so that uniform attention gives every token the score 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import Scorer


def _one(row_index: Tensor) -> Tensor:
    return torch.ones_like(row_index, dtype=torch.float32)


def _visible_keys(row_index: Tensor) -> Tensor:
    return row_index.float() + 1.0


def _zero(key: Tensor, position: Tensor, head: Tensor) -> Tensor:
    return torch.zeros(key.shape[:-1], dtype=torch.float32, device=key.device)


def _sum(score: Tensor, votes: Tensor) -> Tensor:
    return score


def _per_vote(score: Tensor, votes: Tensor) -> Tensor:
    return score / votes.clamp(min=1)


RAW = Scorer("raw", True, _one, _zero, _sum)
MEAN = Scorer("mean", True, _one, _zero, _per_vote)
LIFT = Scorer("lift", True, _visible_keys, _zero, _per_vote)
