"""Two stages: half of a head's budget by attention, the rest by attention times projected value.

Source: CriticalKV, "Identify Critical KV Cache in LLM Inference from an Output Perturbation
Perspective" (arXiv 2502.03805), algorithm 1 with its α = 0.5 and ε = 1e-4.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.errors import PlanError
from kvcompress.evict.scorers.attention import MeanScorer
from kvcompress.evict.scorers.base import Tokens
from kvcompress.evict.scorers.value import relative

FIRST_STAGE: Final = 0.5  # share of the budget that goes by attention alone
EPSILON: Final = 1e-4  # added to a token's share of its head's attention
_BLOCK: Final = 1024  # tokens that are projected at a time


class CriticalScorer(MeanScorer):
    """Attention sums, turned at the prompt's end into one number that both stages are read from.

    Stage two scores (A + ε) ‖W_O v‖₁, with ‖W_O v‖₁ divided by its mean over the row's heads. The
    tokens that stage one picks are raised above these. Without a budget stage two stands alone.
    Query heads that share a KV head count with the mean of their ‖W_O v‖₁. Rows after the prompt
    add plain attention. Differs from the paper where heads share budgets (`PooledBudget`): each
    head's first stage is half of the budget that it would have alone.
    """

    needs = frozenset({"output_weight"})

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        real = tokens.valid[:, None]
        total = score.masked_fill(~real, 0.0).sum(-1, keepdim=True).clamp(min=1.0)
        size = relative(projected_sizes(tokens), tokens, across_heads=True)
        second = (score + EPSILON * total) * size
        if tokens.budget is None:
            return second
        offered = real if tokens.candidate is None else real & tokens.candidate
        order = score.masked_fill(~offered, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        first = offered & (place < (tokens.budget * FIRST_STAGE).long().unsqueeze(-1))
        above = 2 * second.masked_fill(~real, 0.0).amax((1, 2), keepdim=True)
        return torch.where(first, above + score, second)


def projected_sizes(tokens: Tokens) -> Tensor:
    """``[B, Hg, T]`` mean over a group's query heads of ‖W_O v‖₁.

    Raises:
        PlanError: where the attention module has no output projection that reads the heads.
    """
    weight, value = tokens.output_weight, tokens.value.float()
    if weight is None:
        raise PlanError(
            f"layer {tokens.layer}: the scorer needs the attention's output projection and found "
            "none that reads its heads; use `scorer: value`"
        )
    batch, heads, count, width = value.shape
    size = value.new_zeros(batch, heads, count)
    parts = weight.float().unflatten(-1, (-1, width))  # [Hg, hidden, G, Dv]
    for head in range(heads):
        for query_head in range(parts.shape[2]):
            matrix = parts[head, :, query_head].mT
            for low in range(0, count, _BLOCK):
                block = slice(low, low + _BLOCK)
                size[:, head, block] += (value[:, head, block] @ matrix).abs().sum(-1)
    return size / parts.shape[2]


CRITICAL = CriticalScorer("critical")
