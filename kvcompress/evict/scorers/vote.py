"""Votes instead of sums: a row finds a key important when it gives it more than an even share.

Row t attends to t tokens; a key with A[t, i] ≥ 1/t is important to it. t counts the tokens that the
row could see in the full cache, so a row that sees fewer after eviction finds more keys important.

Sources: Scissorhands (arXiv 2305.17118), algorithm 2, drops the tokens that most rows found
unimportant. CORM (arXiv 2404.15949), section 4, drops the tokens that none of the last w rows found
important.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import QueryRows, Scorer


def important(probability: Tensor, rows: QueryRows) -> Tensor:
    """``[S, G, n, C]`` bool: whether each row gives each key at least its even share."""
    seen = (rows.index + 1).clamp(min=1).to(probability.dtype)
    return probability >= (1 / seen)[:, None, :, None]


class VoteScorer(Scorer):
    """QueryRows that found the token important; ranked by those that did not, fewer is better.

    Query heads that share a KV head have one vote together, each its part of it.
    Differs from Scissorhands: it forgets what rows more than 400 steps ago said; here the rows that
    vote are the prompt's last `score_rows` and every decoded token.
    """

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        return super().collect(important(probability, rows).to(probability.dtype), rows)

    def rank(self, score: Tensor, votes: Tensor, now: int | Tensor) -> Tensor:
        return score - votes


class LastImportantScorer(Scorer):
    """Position of the last row that found the token important; its own where none did.

    A token that none of the last w rows finds important is one whose last important row is w or
    more rows old, so this number stands for CORM's ring of w bits, and tokens younger than w, which
    CORM spares, are spared by their own position. Ranked by age: the threshold that keeps what CORM
    keeps is −(w − 1).
    One query head of a group is enough to find a token important.
    """

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        votes = important(probability, rows) & (rows.weight > 0)[:, None, :, None]
        position = rows.position.to(probability.dtype).view(1, 1, -1, 1)
        return torch.where(votes, position, -torch.inf).amax((1, 2))

    def merge(self, score: Tensor, votes: Tensor) -> Tensor:
        return torch.maximum(score, votes)

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        return position.float().expand(key.shape[:-1]).clone()

    def rank(self, score: Tensor, votes: Tensor, now: int | Tensor) -> Tensor:
        return score - now


VOTE = VoteScorer("vote")
CORM = LastImportantScorer("corm")
