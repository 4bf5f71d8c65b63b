"""A plan from a profile and chosen heads, and what it is expected to cost."""

from __future__ import annotations

import numpy as np
from pydantic import ValidationError

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import HeadPlan, Plan, WeightScheme, explain
from kvcompress.profile.candidates import codes_nothing
from kvcompress.profile.store import PATH, ExactSetting, Profile
from kvcompress.recipe import Keep

Heads = tuple[tuple[HeadPlan, ...], ...]


def assemble(
    profile: Profile,
    keep: Keep,
    heads: Heads,
    target: str,
    predicted_loss: float | None,
    weights: tuple[WeightScheme, ...] = (),
) -> Plan:
    """A plan of these heads. It carries the predicted loss only where that is in nats.

    Raises:
        PlanError: if the heads and the settings do not go together.
    """
    try:
        return Plan(
            model=profile.shape,
            heads=heads,
            target=target,
            predicted_loss=predicted_loss if profile.loss_unit == "nats" else None,
            weights=weights,
            **settings(profile, keep),  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise PlanError(f"{target}: {explain(error)}") from None


def reads_twice(keep: Keep) -> bool:
    """Whether the scorer needs every prompt read twice, which the profile does not do."""
    return "repeat" in scorer(keep.scorer).needs


def settings(profile: Profile, keep: Keep) -> dict[str, object]:
    """The fields of `Plan` that every head shares; those of `Keep` have the same names."""
    return {name: getattr(keep, name) for name in Keep.model_fields} | {
        "special_ids": profile.special_ids,
        "punct_ids": profile.punct_ids,
        "repeat_ids": profile.repeat_ids if reads_twice(keep) else (),
        "special_share": profile.special_share,
        "punct_share": profile.punct_share,
        "tokenizer_hash": profile.tokenizer_hash,
        "max_position": profile.shape.max_position,
    }


def summed_loss(setting: ExactSetting, heads: Heads) -> float | None:
    """Sum of the heads' losses, None where a head was not measured."""
    place = {head: i for i, head in enumerate(setting.candidates)}
    total = 0.0
    for layer, row in enumerate(heads):
        for number, head in enumerate(row):
            column = bare_column(setting) if codes_nothing(head) else place.get(head)
            if column is None:
                return None
            total += setting.losses[layer][number][column]
    return total


def expected(profile: Profile, loss: float) -> float:
    """A sum of losses as the KL in nats per token that it stands for.

    Heads' losses are slopes of a path along which KL rises, slowly at first: the share of the whole
    path that a plan's losses make up is where on the path it stands. Beyond its end KL goes on in
    proportion. Larger losses never give a smaller figure. A profile without a path has the sum.
    """
    whole = _whole_path(profile)
    if not whole:
        return loss
    share = loss / whole
    nats = (0.0, *profile.path_nats)
    if share > 1:
        return nats[-1] * share
    return float(np.interp(share, (0.0, *PATH, 1.0), nats))


def summed_nats(profile: Profile, nats: float) -> float:
    """The inverse of `expected`: the sum of losses that `nats` of KL stand for."""
    whole = _whole_path(profile)
    if not whole:
        return nats
    path = (0.0, *profile.path_nats)
    if nats > path[-1]:
        return whole * nats / path[-1]
    return whole * float(np.interp(nats, path, (0.0, *PATH, 1.0)))


def bare_column(setting: ExactSetting) -> int:
    """Column of the head that holds sinks and recent tokens alone."""
    return next(i for i, head in enumerate(setting.candidates) if codes_nothing(head))


def _whole_path(profile: Profile) -> float:
    """Summed loss of bare heads everywhere; 0 where there is no path to lay it on."""
    if not profile.path_nats or profile.path_nats[-1] <= 0:
        return 0.0
    own = profile.settings[0]
    column = bare_column(own)
    return sum(row[column] for layer in own.losses for row in layer)
