"""Spend a budget over independent heads: one choice for each, so that their losses sum to little.

`spend` buys upgrades along the lower convex hulls of the heads' (bytes, loss) points, those first
that save most loss per byte. That is optimal at every budget where an upgrade just fits (Everett,
1963). The rest of the budget buys the best single upgrades that fit, on the hull or not.

A larger budget never gives a larger loss. Between two hull budgets `spend` fills the rest at fixed
steps and takes the best filling of all steps within the budget. No filling saves more than the next
hull upgrade, because no upgrade saves more per byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

_FILL_STEPS: Final = 32


@dataclass(frozen=True, slots=True)
class Choice:
    """What one head may take; `column` is the caller's name for it."""

    size_bytes: int
    loss: float
    column: int


def minimum_bytes(heads: Sequence[Sequence[Choice]]) -> int:
    return sum(min(c.size_bytes for c in choices) for choices in heads)


def spend(heads: Sequence[Sequence[Choice]], budget_bytes: int) -> list[Choice]:
    """One choice for each head, together at most `budget_bytes`.

    Raises:
        ValueError: if even the smallest choices need more.
    """
    if minimum_bytes(heads) > budget_bytes:
        raise ValueError(f"{budget_bytes} bytes do not hold the smallest choices")
    fronts = [frontier(choices) for choices in heads]
    taken = [0] * len(fronts)
    used = sum(front[0].size_bytes for front in fronts)
    step_bytes = 0
    for head, place in _upgrades(fronts):
        step_bytes = fronts[head][place].size_bytes - fronts[head][taken[head]].size_bytes
        if used + step_bytes > budget_bytes:
            break
        taken[head] = place
        used += step_bytes
    else:
        step_bytes = 0
    best, least = taken, _total(fronts, taken)
    for step in range(1, _FILL_STEPS + 1):
        left = step_bytes * step // _FILL_STEPS
        if not step_bytes or used + left > budget_bytes:
            break
        filled = _fill(fronts, taken, left)
        loss = _total(fronts, filled)
        if loss < least:
            best, least = filled, loss
    return [front[place] for front, place in zip(fronts, best, strict=True)]


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other one beats in size and loss, the smallest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size_bytes, c.loss, c.column)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def hull(front: Sequence[Choice]) -> list[int]:
    """Places of a frontier's lower convex hull: along it, loss saved per byte falls."""
    places: list[int] = []
    for place in range(len(front)):
        while len(places) > 1 and _gain(front, places[-2], places[-1]) <= _gain(
            front, places[-1], place
        ):
            places.pop()
        places.append(place)
    return places


def _gain(front: Sequence[Choice], small: int, large: int) -> float:
    """Loss saved per byte."""
    size = front[large].size_bytes - front[small].size_bytes
    return (front[small].loss - front[large].loss) / size


def _upgrades(fronts: Sequence[Sequence[Choice]]) -> list[tuple[int, int]]:
    """(head, place to move to), the best first; a head's own upgrades stay in order."""
    steps = []
    for head, front in enumerate(fronts):
        places = hull(front)
        for small, large in zip(places, places[1:], strict=False):
            steps.append((-_gain(front, small, large), head, large))
    return [(head, large) for _, head, large in sorted(steps)]


def _total(fronts: Sequence[Sequence[Choice]], taken: Sequence[int]) -> float:
    return float(sum(front[place].loss for front, place in zip(fronts, taken, strict=True)))


def _fill(fronts: Sequence[Sequence[Choice]], taken: Sequence[int], left: int) -> list[int]:
    """Upgrades from `taken` within `left` bytes, each the best per byte of those that still fit."""
    places = np.array(taken)
    width = max(map(len, fronts))
    sizes = np.full((len(fronts), width), np.iinfo(np.int64).max // 2)
    losses = np.full((len(fronts), width), np.inf)
    for head, front in enumerate(fronts):
        sizes[head, : len(front)] = [c.size_bytes for c in front]
        losses[head, : len(front)] = [c.loss for c in front]
    rows = np.arange(len(fronts))
    while True:
        extra = sizes - sizes[rows, places][:, None]
        saved = losses[rows, places][:, None] - losses
        fits = (extra > 0) & (extra <= left)
        if not fits.any():
            return [int(place) for place in places]
        rate = np.where(fits, saved / np.where(fits, extra, 1), -np.inf)
        head, place = divmod(int(rate.argmax()), width)
        left -= int(extra[head, place])
        places[head] = place
