"""The keep rule: one number per token and head, larger is kept.

    class tokens (special, punctuation)   +inf, never dropped
    tokens inside the local window        above every score, newer first
    the rest                              by score in a head with a `frequent` budget, else by age
    tokens that may not be kept           −inf
A head keeps its best `capacity` tokens, so room that one part leaves unused goes to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.scorers import Scorer
from kvcompress.plan import HeadPlan

SPECIAL_FLAG: Final = 1
PUNCT_FLAG: Final = 2
_LOCAL: Final = (
    2.0**66
)  # times a float32 in [1, 2): exact for positions below 2**23, above any score


def class_mask(head: HeadPlan) -> int:
    """Bits of the token classes that the head protects."""
    return SPECIAL_FLAG * head.special + PUNCT_FLAG * head.punct


@dataclass(frozen=True, slots=True)
class HeadRules:
    """The keep rule's settings of a group of heads, as tensors that broadcast over slots.

    Attributes:
        classes: ``[H]`` int, see `class_mask`.
        by_score: ``[H]`` whether the rest is ranked by score.
        keeps_rest: ``[H]`` whether the head has room for anything but class tokens.
    """

    classes: Tensor
    by_score: Tensor
    keeps_rest: Tensor

    @staticmethod
    def of(heads: list[HeadPlan], device: torch.device) -> HeadRules:
        rest = [h.full or h.frequent is not None or h.local is not None for h in heads]
        return HeadRules(
            torch.tensor([class_mask(h) for h in heads], device=device),
            torch.tensor([h.frequent is not None for h in heads], device=device),
            torch.tensor(rest, device=device),
        )


def priority(
    rules: HeadRules,
    scorer: Scorer,
    head: Tensor,
    window_tokens: Tensor,
    position: Tensor,
    score: Tensor | None,
    protected: Tensor,
    votes: Tensor,
    now: int,
) -> Tensor:
    """float32 priority of tokens.

    Args:
        head: index into `rules`, broadcastable to `position`.
        window_tokens: newest tokens that count as local in the token's row and head, broadcastable.
        position: int, −1 for an empty slot, which gets −inf.
        score: float32, or None in a group of heads that never ranks by score.
        protected: bool, token is of a class that its head keeps.
        votes: number of query rows that saw the token.
        now: newest position.
    """
    rest = position.float()
    if score is not None:
        rest = torch.where(rules.by_score[head], scorer.rank(score, votes), rest)
    local = _LOCAL * (1.0 + position.float() * 2.0**-23)
    value = torch.where(position > now - window_tokens, local, rest)
    value = torch.where(rules.keeps_rest[head], value, -torch.inf)
    value = torch.where(protected, torch.inf, value)
    return torch.where(position < 0, -torch.inf, value)
