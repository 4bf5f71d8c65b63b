"""Attention sums times the size of the value: a token whose value is small adds little anyway.

Source: VATP, "Attention Score is Not All You Need for Token Importance" (arXiv 2406.12335), on
the sums of H2O (arXiv 2306.14048).
"""

from __future__ import annotations

from torch import Tensor

from kvcompress.evict.scorers.base import Scorer, Tokens


class ValueScorer(Scorer):
    """Attention sums of a prompt, each times ‖v‖₁ over the head's mean ‖v‖₁.

    The mean leaves a head's ranks as they are and keeps scores in units of attention. Differs from
    the paper: sizes are applied once, at the prompt's end; later rows add plain attention.
    """

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        return score * relative(tokens.value.float().abs().sum(-1), tokens)


def relative(size: Tensor, tokens: Tokens, across_heads: bool = False) -> Tensor:
    """``[B, Hg, T]`` sizes over their mean over the row's real tokens; 1 where all are 0.

    Args:
        across_heads: one mean for the row's heads together, so that heads stay comparable.
    """
    real = tokens.valid[:, None].to(size.dtype)
    mean = (size * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    if across_heads:
        mean = mean.mean(1, keepdim=True)
    return (size / mean.clamp(min=1e-30)).masked_fill(mean == 0, 1.0)


VALUE = ValueScorer("value")
