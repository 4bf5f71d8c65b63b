"""Every entry at a byte target: the largest size that fits, found by what the entry can vary.

A plan whose bytes do not depend on the text is sized by `accounting`, which is exact. Where they do
(token classes, choices made for each request), the bytes of a few calibration prompts are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvcompress.accounting import kv_bytes
from kvcompress.errors import PlanError
from kvcompress.league.entries import Entry
from kvcompress.league.requests import CAP_ROOM, request_dial
from kvcompress.league.scale import (
    depends_on_text,
    has_budgets,
    in_tokens,
    keep_at,
    keeps_all,
    scaled,
)
from kvcompress.plan import FastGenChoice, ModelShape, Plan, StrictModel, Threshold
from kvcompress.recipe import (
    BytesPolicy,
    DuoPolicy,
    FastGenPolicy,
    LayersPolicy,
    Policy,
    Recipe,
    StaticCurvePolicy,
)

TOLERANCE: Final = 0.02  # of the target: what counts as equal bytes
OWN_BYTES: Final = frozenset({"quantization", "recall", "own"})  # roles that no target changes
_OVER: Final = 0.005  # measured bytes may lie this far above the target, as prompts differ
_PROBES: Final = 8  # plans measured for one target at most
_HALVINGS: Final = 40
Solve = Callable[[Recipe], Plan]
Measure = Callable[[Plan, int], int]  # (plan, length in tokens) -> mean bytes of a row


class Placed(StrictModel):
    """An entry's plan at one byte target.

    Attributes:
        point: target as a share of the 16-bit bytes; None for an entry at its own bytes.
        kv_bytes: of one row of `length_tokens` tokens, accounted, or measured where `measured`.
        short: how the bytes fall short of the target by more than `TOLERANCE`; empty otherwise.
    """

    entry: str
    point: float | None
    length_tokens: int
    plan: Plan
    kv_bytes: int
    measured: bool = False
    short: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What tuning needs of the outside world."""

    shape: ModelShape
    solve: Solve
    bits_only: Solve
    measure: Measure


def place(bench: Bench, entry: Entry, point: float, length_tokens: int) -> Placed:
    """`entry` at `point`, or at its own bytes if it keeps every token in a fixed code.

    Raises:
        PlanError: if its smallest plan is above the target.
    """
    recipe = entry.recipe
    assert recipe is not None, "the reference has no plan"
    if entry.role in OWN_BYTES:
        plan = bench.solve(recipe)
        return Placed(
            entry=entry.name,
            point=None,
            length_tokens=length_tokens,
            plan=plan,
            kv_bytes=kv_bytes(plan, length_tokens, 1),
        )
    target = int(point * bench.shape.bf16_kv_bytes(length_tokens, 1))
    sized = sized_recipe(bench.shape, recipe, point, length_tokens)
    solve = bench.bits_only if entry.bits_only else bench.solve

    def accounted(target_bytes: int) -> Plan:
        plan = _by_policy(bench, solve, sized, target_bytes, length_tokens)
        return _by_tokens(plan, target_bytes, length_tokens)

    if isinstance(sized.keep.per_request, FastGenChoice):  # its recovery is the dial
        plan = _by_policy(bench, solve, sized, target, length_tokens)
    elif isinstance(sized.keep.per_request, Threshold):
        plan = accounted(int(CAP_ROOM * target))
    else:
        plan = accounted(target)
    measured = depends_on_text(plan)
    held = kv_bytes(plan, length_tokens, 1)
    if measured:
        plan, held = _by_measuring(bench, plan, accounted, target, length_tokens)
    return Placed(
        entry=entry.name,
        point=point,
        length_tokens=length_tokens,
        plan=plan.model_copy(update={"target": f"{entry.name} at {point:g} of the bf16 KV bytes"}),
        kv_bytes=held,
        measured=measured,
        short=_short(plan, held, target),
    )


def sized_recipe(shape: ModelShape, recipe: Recipe, point: float, length_tokens: int) -> Recipe:
    """`recipe` with the sinks and recent tokens that `point` leaves it."""
    keep = keep_at(recipe.keep, point, min(length_tokens, shape.max_position))
    return recipe.model_copy(update={"keep": keep})


def _short(plan: Plan, held: int, target: int) -> str:
    if held >= (1 - TOLERANCE) * target:
        return ""
    why = "keeps every token" if keeps_all(plan) else "no larger plan of it fits"
    return f"{why}: {held / target:.1%} of the target's bytes"


def _by_policy(
    bench: Bench, solve: Solve, recipe: Recipe, target_bytes: int, length_tokens: int
) -> Plan:
    """The policy's own dial at the largest value within the target, budgets in tokens."""
    policy = recipe.policy
    name = dial_of(policy)

    def plan_at(value: float) -> Plan:
        changed = policy if name is None else _turned(policy, name, value, bench, length_tokens)
        return in_tokens(solve(recipe.model_copy(update={"policy": changed})), length_tokens)

    if name is None:
        return plan_at(1.0)

    def fits(value: float) -> bool:
        try:
            return kv_bytes(plan_at(value), length_tokens, 1) <= target_bytes
        except PlanError:  # nothing so small: a larger value may still be above the target
            return True

    value = largest(fits, 0.0, 1.0)
    if value is None:
        raise _too_large(recipe, target_bytes)
    plan = plan_at(max(value, 1e-6))
    if kv_bytes(plan, length_tokens, 1) > target_bytes:
        raise _too_large(recipe, target_bytes)
    return plan


def dial_of(policy: Policy) -> str | None:
    """The field of `policy`, in (0, 1], that more bytes are bought with; None: its budgets."""
    match policy:
        case BytesPolicy():
            return "keep_ratio"
        case FastGenPolicy():
            return "recovery"
        case StaticCurvePolicy():
            return "ratio"
        case DuoPolicy():
            return "full_share"
        case LayersPolicy():
            return None if policy.ratio is None else "ratio"
    return None


def _turned(policy: Policy, name: str, value: float, bench: Bench, length_tokens: int) -> Policy:
    changes: dict[str, object] = {name: max(1e-6, value)}
    if isinstance(policy, BytesPolicy):
        context = min(length_tokens, bench.shape.max_position)
        changes |= {"memory": None, "context": context, "batch": 1}
    return policy.model_copy(update=changes)


def _by_tokens(plan: Plan, target_bytes: int, length_tokens: int) -> Plan:
    """`plan` with its budgets times the largest factor within the target.

    Raises:
        PlanError: if it is above the target without any budget.
    """
    if not has_budgets(plan):
        if kv_bytes(plan, length_tokens, 1) > target_bytes:
            raise PlanError(f"needs more than {target_bytes} bytes at {length_tokens} tokens")
        return plan

    def at(factor: float, extra: int = 0) -> Plan:
        return scaled(plan, factor, extra, length_tokens)

    def allowed(sized: Plan) -> bool:
        return _within_positions(sized) and kv_bytes(sized, length_tokens, 1) <= target_bytes

    def fits(factor: float) -> bool:
        return allowed(at(factor))

    factor = largest(fits, 0.0, float(length_tokens))
    if factor is None:
        least = kv_bytes(at(0.0), length_tokens, 1)
        raise PlanError(f"needs {least} bytes without any budget, the target has {target_bytes}")
    best = at(factor)
    for extra in range(1, plan.model.layers):
        more = at(factor, extra)
        if not allowed(more):
            break
        best = more
    return best


def _within_positions(plan: Plan) -> bool:
    """Whether heads that number their tokens anew have positions for all of them."""
    if plan.positions != "relative":
        return True
    most = plan.max_position - plan.sink_tokens - 2 * plan.recent_tokens
    held = (
        sum(b.tokens or 0 for b in (head.frequent, head.local) if b is not None)
        for layer in plan.heads
        for head in layer
    )
    return max(held) <= most


def largest(fits: Callable[[float], bool], low: float, high: float) -> float | None:
    """The largest value in [low, high] that fits, to 2⁻⁴⁰ of the range; None if none does.

    Args:
        fits: holds up to some value and not beyond.
    """
    if fits(high):
        return high
    if not fits(low):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _by_measuring(
    bench: Bench,
    plan: Plan,
    accounted: Callable[[int], Plan],
    target: int,
    length_tokens: int,
) -> tuple[Plan, int]:
    """The plan of the most measured bytes within the target, of at most `_PROBES` plans."""
    change = request_dial(plan)
    best: tuple[Plan, int] | None = None
    low, high, value = 0.0, 1.0, 0.5
    ask = target
    for _ in range(_PROBES):
        tried = plan if change is None else change(value)
        held = bench.measure(tried, length_tokens)
        fits = held <= (1 + _OVER) * target
        if fits and (best is None or held > best[1]):
            best = (tried, held)
        if fits and held >= (1 - TOLERANCE) * target:
            break
        if change is not None:
            low, high = (value, high) if fits else (low, value)
            value = (low + high) / 2
            continue
        ask = min(2 * target, int(ask * target / held))
        try:
            retried = accounted(ask)
        except PlanError:
            break
        if retried == plan:
            break
        plan = retried
    if best is None:
        raise PlanError(f"its measured bytes stay above the target of {target}")
    return best


def _too_large(recipe: Recipe, target_bytes: int) -> PlanError:
    return PlanError(f"{recipe.name}: no plan of it fits {target_bytes} bytes")
