"""KVzip: a token matters as much as it is needed to repeat the context.

The model reads its context a second time, behind the first; the score of a context token is the
largest attention that any of those rows, in any query head of the group, pays to it. No question is
needed, so the scores serve every later one.

    kvzip        s_i  = max over rows j and query heads g of A_gji
    kvzip_plus   s⁺_i = (max over j and g of A_gji / ‖h_j‖) · max over g of ‖W_O,g v_i‖
with h_j the input of the attention module at row j, and W_O,g the part of the output projection
that reads query head g.

Source: KVzip (arXiv 2505.23416), equation 2; KVzip+ as in KVzap (arXiv 2601.07891).
Differs from the papers: the softmax runs over the whole context and what was repeated so far, not
over one part of the context; s⁺ takes both maxima over g apart, where KVzap takes that of the
product: the same without grouped queries, and never smaller with them.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import QueryRows, Scorer, Tokens, newest

_SMALLEST: Final = 1e-30
_UNREAD: Final = 2.0**29  # below every score of `newest`, above every vote


class KVzipScorer(Scorer):
    """The largest attention of the second reading; tokens that it never saw go newest first."""

    uses_attention = False
    needs = frozenset({"repeat"})

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        votes = (rows.weight > 0)[:, None, :, None]
        return probability.mul(votes).amax((1, 2))

    def merge(self, score: Tensor, votes: Tensor) -> Tensor:
        return torch.where(score >= _UNREAD, votes, torch.maximum(score, votes))

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        return newest(position)


class KVzipPlusScorer(KVzipScorer):
    """As `KVzipScorer`, in units of what the attention adds to the row that pays it."""

    needs = frozenset({"repeat", "output_weight", "hidden"})

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        assert rows.norm is not None, "a scorer that needs hidden states is told their norms"
        norm = rows.norm.clamp(min=_SMALLEST)
        return super().collect(probability / norm[:, None, :, None], rows)

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        return torch.where(score >= _UNREAD, score, score * value_norm(tokens))


KVZIP = KVzipScorer("kvzip")
KVZIP_PLUS = KVzipPlusScorer("kvzip_plus")


def value_norm(tokens: Tokens) -> Tensor:
    """``[B, Hg, T]``: the largest ‖W_O,g v‖ among the query heads g that share a KV head."""
    value = tokens.value.float()
    if tokens.output_weight is None:  # the module has no output projection
        return value.norm(dim=-1)
    part = tokens.output_weight.unflatten(2, (-1, value.shape[-1]))  # [Hg, hidden, G, Dv]
    gram = torch.einsum("hogd,hoge->hgde", part, part)
    square = torch.einsum("bhtd,hgde,bhte->bhgt", value, gram, value)
    return square.amax(2).clamp(min=0).sqrt()
