"""Scores that add up attention columns: raw sums, their mean, and lift.

Source: H2O (arXiv 2306.14048) keeps raw sums. Under uniform causal attention the raw sum of token i
of n is H_n − H_i, so early tokens win without being looked at; `mean` divides by the rows that saw
the token and keeps most of that bias; `lift` weighs row q by the q + 1 keys that it shares its
attention over, so that uniform attention gives every token the score 1.
"""

from __future__ import annotations

from torch import Tensor

from kvcompress.evict.scorers.base import Scorer


class MeanScorer(Scorer):
    """Attention per vote."""

    def rank(self, score: Tensor, votes: Tensor, now: int | Tensor) -> Tensor:
        return score / votes.clamp(min=1)


class LiftScorer(MeanScorer):
    """Attention per vote, in units of what uniform attention would give."""

    def row_weight(self, row_index: Tensor) -> Tensor:
        return row_index.float() + 1.0


RAW = Scorer("raw")
MEAN = MeanScorer("mean")
LIFT = LiftScorer("lift")
