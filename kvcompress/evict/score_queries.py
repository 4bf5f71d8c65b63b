"""The votes of a prompt's query rows, where a plan has sums of attention estimated.

With `score_rows` N and `score_stride` s, row q of n counts for key p ≤ q
    once      where q is one of the last N rows, or p one of the N newest keys that q sees;
    s times   where q votes for its s rows;
    never     elsewhere.
One row of every s, counted from the sequence's first real token, votes for all of them. Its place
among them moves from one s to the next along multiples of the golden ratio (a Weyl sequence). Each
place then comes equally often, and text that repeats itself every s tokens is not always read at
the same place. A far pair is sampled with probability 1/s and weighs s, so the sums are unbiased
estimates of those over all rows. A score is divided by all rows that could see the token, as if
each of them had voted.

Near pairs are not sampled because most attention is near: a row gives much to itself and to the
few keys before it, and s times that would drown what the sums are to find. See
docs/heavy-hitters.md for how many of the best tokens the estimate finds.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_GOLDEN: Final = 40503  # fraction of the golden ratio in units of 2^-16; odd: every place comes


def votes_for_its_stride(row: Tensor, stride: int) -> Tensor:
    """Whether each row is the one of its `stride` rows that votes for all of them.

    Args:
        row: int64 number of the row among its sequence's real tokens; negative ones never vote.
    """
    number = row.div(stride, rounding_mode="floor")
    place = ((number * _GOLDEN & 0xFFFF) * stride) >> 16
    return (row >= 0) & (row - number * stride == place)


def far_weight(row: Tensor, first_last: int | Tensor, stride: int) -> Tensor:
    """Float32 weight of each row's votes for keys that are not among its newest.

    Args:
        row: as in `votes_for_its_stride`.
        first_last: number of the first of the last `score_rows` rows.
    """
    sampled = votes_for_its_stride(row, stride).float() * stride
    return torch.where(row >= first_last, (row >= 0).float(), sampled)


def pair_weight(row: Tensor, key: Tensor, first_last: int, near: int, stride: int) -> Tensor:
    """``[n, S]`` float32: how often each row ``[n]`` counts for each key ``[S]``, by their numbers.

    Args:
        near: keys that every row votes for, `score_rows`.
    """
    far = far_weight(row, first_last, stride)[:, None]
    return torch.where(row[:, None] - key[None, :] < near, torch.ones_like(far), far)
