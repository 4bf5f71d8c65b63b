"""The newest row's attention, averaged over all heads of the layer: no memory of earlier rows.

Source: TOVA, "Transformers are Multi-State RNNs" (arXiv 2401.06104), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import QueryRows, Scorer

_SILENT = -1.0  # no row has voted: attention is never negative


class LatestScorer(Scorer):
    """The mean over the query heads of what the newest voting row gave the token.

    At a prompt's end only its last row counts, so a plan with ``score_rows`` 1 computes the same.
    """

    across_heads = True

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        votes = rows.weight > 0
        place = torch.arange(1, votes.shape[1] + 1, device=votes.device)
        last = (votes * place).amax(-1)  # [S], 0 where no row votes
        index = (last - 1).clamp(min=0).view(-1, 1, 1, 1)
        newest = probability.take_along_dim(index, 2).squeeze(2).mean(1)
        return newest.masked_fill((last == 0).unsqueeze(-1), _SILENT)

    def merge(self, score: Tensor, votes: Tensor) -> Tensor:
        return torch.where(votes < 0, score, votes)


TOVA = LatestScorer("tova")
