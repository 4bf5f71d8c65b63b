"""A fixed random number per (position, KV head): the baseline that a scorer has to beat."""

from __future__ import annotations

from torch import Tensor

from kvcompress.evict.scorers.base import Scorer, Tokens


class RandomScorer(Scorer):
    """Uniform in [0, 1): multiply-and-shift mixing, the same on every device."""

    uses_attention = False

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        state = (position.long() * 2654435761 + head.long() * 40503 + 12345) & 0xFFFFFFFF
        for shift in (16, 15):
            state = ((state ^ (state >> shift)) * 73244475) & 0xFFFFFFFF
        return ((state ^ (state >> 16)) & 0xFFFFFF).float() / 2**24


class RandomGeneratedScorer(RandomScorer):
    """Tokens of a prompt before generated ones, at random within both.

    With a budget above the prompt's length the prompt stays and generated tokens go at random: the
    baseline that "Random Attention" (2026) found hard to beat on long generations.
    """

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        return score + 1.0


RANDOM = RandomScorer("random")
RANDOM_GENERATED = RandomGeneratedScorer("random_generated")
