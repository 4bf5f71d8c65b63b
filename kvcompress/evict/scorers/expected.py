"""Attention that queries still to come are expected to give, from the moments of past ones.

Queries before RoPE are taken as normal, N(μ, Σ) in each query head. Averaged over the next 512
positions RoPE is a linear map R̄, so a query to come is N(R̄μ, R̄ΣR̄ᵀ), and a key's expected
unnormalised attention is, with s the scaling of the softmax,
    exp(s k·R̄μ + s² kᵀ R̄ΣR̄ᵀ k / 2).
A token's score is its share of that among the prompt's tokens, averaged over the query heads that
share its KV head, times ‖v‖. All of it is computed as a logarithm: shares underflow, their order
must not.

Source: "Expected Attention" (arXiv 2510.00636), section 3, with its 512 positions and 4 sinks,
which have no part in the moments and in the sum that shares are taken of. Differs from the paper:
‖v‖ in place of ‖W_O v‖, as in its authors' code; the newest 4096 queries; decoded tokens are kept
newest first; a soft cap of the logits is not modelled.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.scorers.base import PromptScorer, Tokens
from kvcompress.quant.keystats import Rotation

FUTURE_POSITIONS: Final = 512
SINKS: Final = 4
_SMALLEST: Final = 1e-30  # norm of a value that is zero


class ExpectedScorer(PromptScorer):
    """See the module docstring."""

    needs = frozenset({"rotation"})
    query_rows = 4096

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        counted = without_sinks(tokens.valid)
        mean, covariance = moments(*future_queries(tokens, counted))
        key = tokens.key.float().unsqueeze(2) * tokens.scaling
        logits = (key @ mean.unsqueeze(-1)).squeeze(-1)  # [B, Hg, G, T]
        logits = logits + ((key @ covariance) * key).sum(-1) / 2
        others = logits.masked_fill(~counted[:, None, None], -torch.inf)
        share = logits - others.logsumexp(-1, keepdim=True)
        size = tokens.value.float().norm(dim=-1).clamp(min=_SMALLEST).log()
        return share.logsumexp(2) - math.log(logits.shape[2]) + size


def without_sinks(valid: Tensor) -> Tensor:
    """``[B, T]`` bool: a row's real tokens but the first four; all where it has no others."""
    later = valid & (valid.long().cumsum(-1) > SINKS)
    return torch.where(later.any(-1, keepdim=True), later, valid)


def future_queries(tokens: Tokens, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt's queries ``[B, Hg, G, T', D]`` as they would be at the next positions, on average
    over these, and which of them count, ``[B, T']``.

    Raises:
        ValueError: without queries.
    """
    count = tokens.query.shape[3]
    if not count:
        raise ValueError("expected attention needs the prompt's queries, and got none")
    query, position = tokens.query.float(), tokens.position[-count:]
    if tokens.rotation is not None:
        query = tokens.rotation.turn(query, tokens.position[-1] - position)
        query = mean_turned(query, tokens.rotation)
    return query, counted[:, -count:]


def mean_turned(query: Tensor, rotation: Rotation) -> Tensor:
    """`query` ``[..., D]``, averaged over being turned by 1 to `FUTURE_POSITIONS` positions."""
    steps = torch.arange(1, FUTURE_POSITIONS + 1, device=query.device).double()
    angle = steps[:, None] * rotation.inv_freq.to(query.device).double()
    return rotation.turn_by(query, angle.cos().mean(0), angle.sin().mean(0))


def moments(query: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, Hg, G, D]`` and population covariance ``[B, Hg, G, D, D]`` over counted rows."""
    weight = counted[:, None, None, :, None].to(query.dtype)
    number = weight.sum(3).clamp(min=1)
    mean = (query * weight).sum(3) / number
    centred = (query - mean.unsqueeze(3)) * weight
    covariance = torch.einsum("bhgtd,bhgte->bhgde", centred, centred) / number.unsqueeze(-1)
    return mean, covariance


EXPECTED = ExpectedScorer("expected")
