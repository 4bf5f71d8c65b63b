"""The keep rule: one number per token and head, larger is kept.

    protected spans                       +inf, never dropped
    special tokens                        newer first
    tokens inside the local window        newer first
    punctuation                           newer first
    the rest                              by score in a head with a `frequent` budget, else by age
    tokens that may not be kept           −inf
A token of several classes has the highest. A head keeps its best `capacity` tokens, so room that
one part leaves unused goes to the next; without a cap its capacity has room for every class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.scorers import Scorer
from kvcompress.plan import HeadPlan

SPECIAL_FLAG: Final = 1
PUNCT_FLAG: Final = 2
# Score of a class token, above what any scorer gives; adding attention to it changes nothing.
SPECIAL_SCORE: Final = 2.0**120
PUNCT_SCORE: Final = 2.0**110
# Ranks: a tier times a float32 in [1, 2), exact for positions below 2**23, above any score.
SPECIAL_TIER: Final = 2.0**100
LOCAL_TIER: Final = 2.0**66
PUNCT_TIER: Final = 2.0**40


def class_mask(head: HeadPlan) -> int:
    """Bits of the token classes that the head protects."""
    return SPECIAL_FLAG * head.special + PUNCT_FLAG * head.punct


@dataclass(frozen=True, slots=True)
class HeadRules:
    """The keep rule's settings of a group of heads, as tensors.

    Attributes:
        classes: ``[H]``, or ``[B, H]`` where each row has its own; int, see `class_mask`.
        by_score: whether the rest is ranked by score.
        keeps_rest: whether the head has room for anything but class tokens.
    """

    classes: Tensor
    by_score: Tensor
    keeps_rest: Tensor

    @staticmethod
    def of(heads: Sequence[HeadPlan], device: torch.device) -> HeadRules:
        """The same for every row."""
        rest = [h.full or h.frequent is not None or h.local is not None for h in heads]
        return HeadRules(
            torch.tensor([class_mask(h) for h in heads], device=device),
            torch.tensor([h.frequent is not None for h in heads], device=device),
            torch.tensor(rest, device=device),
        )

    @staticmethod
    def of_rows(rows: Sequence[Sequence[HeadPlan]], device: torch.device) -> HeadRules:
        """Of each row's own heads."""
        parts = [HeadRules.of(heads, device) for heads in rows]
        return HeadRules(
            torch.stack([p.classes for p in parts]),
            torch.stack([p.by_score for p in parts]),
            torch.stack([p.keeps_rest for p in parts]),
        )


def class_score(classes: Tensor, flags: Tensor, score: Tensor) -> Tensor:
    """`score`, raised to its class where a head with the class bits `classes` keeps the token."""
    kept = flags & classes
    score = score.masked_fill((kept & PUNCT_FLAG) != 0, PUNCT_SCORE)
    return score.masked_fill((kept & SPECIAL_FLAG) != 0, SPECIAL_SCORE)


def priority(
    rules: HeadRules,
    scorer: Scorer,
    head: Tensor | tuple[Tensor, Tensor],
    window_tokens: Tensor,
    position: Tensor,
    score: Tensor | None,
    votes: Tensor,
    now: int | Tensor,
    in_class: Tensor | None = None,
    pinned: Tensor | None = None,
) -> Tensor:
    """float32 priority of tokens.

    Args:
        head: index into `rules`, broadcastable to `position`: the head, or (row, head).
        window_tokens: newest tokens that count as local in the token's row and head, broadcastable.
        position: int, −1 for an empty slot, which gets −inf.
        score: float32 as `class_score` leaves it, or None in a group of heads that never ranks:
            it drops the oldest, or keeps class tokens alone, all of them.
        votes: number of query rows that saw the token.
        now: newest position.
        in_class: bool, where `score` is None: token is of a class that its head keeps.
        pinned: bool, token is in a protected span; None if none is.
    """
    recency = 1.0 + position.float() * 2.0**-23
    rest = position.float()
    if score is not None:
        plain = score.masked_fill(score >= PUNCT_SCORE / 2, 0.0)
        rest = torch.where(rules.by_score[head], scorer.rank(plain, votes, now), rest)
    value = torch.where(position > now - window_tokens, LOCAL_TIER * recency, rest)
    value = torch.where(rules.keeps_rest[head], value, -torch.inf)
    if score is not None:
        punct = (score >= PUNCT_SCORE / 2) & (score < SPECIAL_SCORE / 2)
        value = torch.where(punct, torch.maximum(value, PUNCT_TIER * recency), value)
        value = torch.where(score >= SPECIAL_SCORE / 2, SPECIAL_TIER * recency, value)
    elif in_class is not None:
        value = torch.where(in_class, SPECIAL_TIER * recency, value)
    if pinned is not None:
        value = torch.where(pinned, torch.inf, value)
    return torch.where(position < 0, -torch.inf, value)


def turn_quota(
    rank: Tensor, segment: Tensor, turn: Tensor, quota: Tensor, pinned: Tensor | None
) -> Tensor:
    """Tier of each token: 2 protected, 1 among the best `quota` of its turn, 0 the rest.

    Args:
        rank: ``[N]`` priorities; −inf has tier 0.
        segment, turn: ``[N]`` int64.
        quota: ``[N]`` tokens that each turn keeps in the token's segment.
    """
    free = torch.ones_like(rank, dtype=torch.bool) if pinned is None else ~pinned
    order = rank.argsort(descending=True, stable=True)
    for key in (turn, segment, ~free):
        order = order[key[order].int().argsort(stable=True)]
    place = place_in_run(torch.stack([segment, turn, (~free).long()], 1)[order])
    tier = torch.empty_like(segment)
    tier[order] = (place < quota[order]).long()
    tier = tier.masked_fill(~free, 2)
    return tier.masked_fill(rank == -torch.inf, 0)


def place_in_run(keys: Tensor) -> Tensor:
    """Running index inside each run of equal rows of ``[N]`` or ``[N, K]``, sorted."""
    if not len(keys):
        return keys.reshape(-1).long()
    _, counts = keys.unique_consecutive(return_counts=True, dim=0)
    first = counts.cumsum(0) - counts
    index = torch.arange(len(keys), device=keys.device)
    return index - first.repeat_interleave(counts)
