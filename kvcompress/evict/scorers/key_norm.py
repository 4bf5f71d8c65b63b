"""Keys with a small norm are kept: a trivial baseline (arXiv 2406.11430)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import Scorer


def _unused(row_index: Tensor) -> Tensor:
    return torch.zeros_like(row_index, dtype=torch.float32)


def _negative_norm(key: Tensor, position: Tensor, head: Tensor) -> Tensor:
    return -key.float().norm(dim=-1)


def _score(score: Tensor, votes: Tensor) -> Tensor:
    return score


KEY_NORM = Scorer("key_norm", False, _unused, _negative_norm, _score)
