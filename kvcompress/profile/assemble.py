"""A plan from a profile and chosen heads, and what it is expected to cost."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from pydantic import ValidationError

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import HeadPlan, Plan, WeightScheme, explain
from kvcompress.profile.candidates import codes_nothing
from kvcompress.profile.store import ExactSetting, Profile, TriedPlan
from kvcompress.recipe import Keep

Heads = tuple[tuple[HeadPlan, ...], ...]
Curve = tuple[list[float], list[float]]  # rising losses and their nats


def assemble(
    profile: Profile,
    keep: Keep,
    heads: Heads,
    target: str,
    loss: float | None,
    weights: tuple[WeightScheme, ...] = (),
) -> Plan:
    """A plan of these heads.

    It carries the losses that the profiler measured, where it ran this very plan; else those that
    it expects, where they are in nats.

    Args:
        loss: sum of the losses of heads and weights, None where one was not measured.

    Raises:
        PlanError: if the heads and the settings do not go together.
    """
    found = None if weights else _tried(profile, keep, heads)
    text = recalling = None
    if found is not None:
        text, recalling = found.nats, found.recall_nats
    elif loss is not None and profile.loss_unit == "nats":
        text, recalling = expected(profile, loss), expected_recall(profile, loss)
    try:
        return Plan(
            model=profile.shape,
            heads=heads,
            target=target,
            predicted_loss=text,
            predicted_recall_loss=recalling,
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
    """A sum of losses as the KL in nats per token of text that it stands for.

    Heads' losses are slopes, taken one head at a time. What a plan costs in fact, the profiler has
    measured for plans of several sizes. Between them, KL rises as a power of the summed loss; below
    the smallest of them with the power of the first two, at most 2 (KL is quadratic where changes
    are small); beyond the largest, in proportion. Larger losses never give a smaller figure. A
    profile that tried no plan has the sum.
    """
    curve = _curve(profile)
    return loss if not curve or loss <= 0 else _read_off(curve, loss)


def expected_recall(profile: Profile, loss: float) -> float | None:
    """As `expected`, where the text asks for what stands far above; None where that is unknown."""
    curve = _curve(profile, recall=True)
    if not curve:
        return None
    return 0.0 if loss <= 0 else _read_off(curve, loss)


def _read_off(curve: Curve, loss: float) -> float:
    losses, nats = curve
    if loss < losses[0]:
        return float(nats[0] * (loss / losses[0]) ** _power(losses, nats))
    if loss > losses[-1]:
        return float(nats[-1] * loss / losses[-1])
    return float(np.exp(np.interp(np.log(loss), np.log(losses), np.log(nats))))


def summed_nats(profile: Profile, nats: float) -> float:
    """The inverse of `expected`: the sum of losses that `nats` of KL stand for."""
    curve = _curve(profile)
    if not curve or nats <= 0:
        return nats
    losses, known = curve
    if nats < known[0]:
        return float(losses[0] * (nats / known[0]) ** (1 / _power(losses, known)))
    if nats > known[-1]:
        return float(losses[-1] * nats / known[-1])
    return float(np.exp(np.interp(np.log(nats), np.log(known), np.log(losses))))


def _curve(profile: Profile, recall: bool = False) -> Curve | None:
    """Rising losses and nats of the plans that were tried; None where there are none."""
    both = [(p.loss, p.recall_nats if recall else p.nats) for p in profile.tried]
    points = [(loss, nats) for loss, nats in both if loss and nats is not None]
    losses: list[float] = []
    nats: list[float] = []
    for loss, there in sorted(points):
        if there > (nats[-1] if nats else 0.0) and loss > (losses[-1] if losses else 0.0):
            losses.append(loss)
            nats.append(there)
    return (losses, nats) if losses else None


def _power(losses: list[float], nats: list[float]) -> float:
    if len(losses) < 2:
        return 1.0
    rise = np.log(nats[1] / nats[0]) / np.log(losses[1] / losses[0])
    return float(np.clip(rise, 1.0, 2.0))


def plan_digest(keep: Keep, heads: Heads) -> str:
    """sha256 of what decides which tokens a plan holds and in how many bits."""
    shown = [[head.model_dump(mode="json") for head in row] for row in heads]
    text = json.dumps([keep.model_dump(mode="json"), shown], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tried(profile: Profile, keep: Keep, heads: Heads) -> TriedPlan | None:
    """A plan that the profiler ran; None for one that it did not."""
    digest = plan_digest(keep, heads)
    return next((plan for plan in profile.tried if plan.digest == digest), None)


def bare_column(setting: ExactSetting) -> int:
    """Column of the head that holds sinks and recent tokens alone."""
    return next(i for i, head in enumerate(setting.candidates) if codes_nothing(head))
