"""A plan from a profile and chosen heads."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan, explain
from kvcompress.profile.predict import Heads
from kvcompress.profile.store import Profile
from kvcompress.recipe import Keep


def assemble(
    profile: Profile,
    keep: Keep,
    heads: Heads,
    target: str,
    predicted_loss: float | None,
    **more: Any,
) -> Plan:
    """`more` are further fields of `Plan`; a loss in another unit than nats is left out.

    Raises:
        PlanError: if the heads and the settings do not go together.
    """
    try:
        return Plan(
            model=profile.shape,
            heads=heads,
            target=target,
            predicted_loss=predicted_loss if profile.loss_unit == "nats" else None,
            **settings(profile, keep),
            **more,
        )
    except ValidationError as error:
        raise PlanError(f"{target}: {explain(error)}") from None


def reads_twice(keep: Keep) -> bool:
    """Whether the scorer's votes are those of a repetition, which the profile does not make."""
    return "repeat" in scorer(keep.scorer).needs


def settings(profile: Profile, keep: Keep) -> dict[str, Any]:
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
