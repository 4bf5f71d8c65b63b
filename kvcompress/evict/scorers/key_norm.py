"""Keys with a small norm are kept: a trivial baseline (arXiv 2406.11430)."""

from __future__ import annotations

from torch import Tensor

from kvcompress.evict.scorers.base import Scorer


class KeyNormScorer(Scorer):
    """Minus the key's norm, of decoded tokens too."""

    uses_attention = False

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        return -key.float().norm(dim=-1)


KEY_NORM = KeyNormScorer("key_norm")
