"""What a plan is expected to cost, from the profile alone."""

from __future__ import annotations

import numpy as np

from kvcompress.plan import HeadPlan
from kvcompress.profile.candidates import codes_nothing
from kvcompress.profile.store import PATH, Profile

Heads = tuple[tuple[HeadPlan, ...], ...]


def summed_loss(profile: Profile, heads: Heads) -> float | None:
    """Sum of the heads' losses, None where a head was not measured."""
    place = {head: i for i, head in enumerate(profile.candidates)}
    total = 0.0
    for layer, row in enumerate(heads):
        for number, head in enumerate(row):
            column = _bare(profile) if codes_nothing(head) else place.get(head)
            if column is None:
                return None
            total += profile.losses[layer][number][column]
    return total


def expected(profile: Profile, loss: float) -> float:
    """A sum of losses as the KL in nats per token that it stands for.

    Heads' losses are slopes of a path along which KL rises, slowly at first: the share of the whole
    path that a plan's losses make up is where on the path it stands. Larger losses never give a
    smaller figure. Losses without gradients stay as they are.
    """
    if not profile.path_nats:
        return loss
    column = _bare(profile)
    whole = sum(row[column] for layer in profile.losses for row in layer)
    share = loss / whole if whole else 0.0
    nats = (0.0, *profile.path_nats)
    end = nats[-1]
    if share > 1:  # worse than bare heads: beyond the path, its last value goes on in proportion
        return end * share
    return float(np.interp(share, (0.0, *PATH, 1.0), nats))


def _bare(profile: Profile) -> int:
    return next(i for i, head in enumerate(profile.candidates) if codes_nothing(head))
