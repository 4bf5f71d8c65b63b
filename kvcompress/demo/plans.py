"""The plans that the demo compares: solved from one profile, and rivals of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvcompress.accounting import kv_bytes
from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, ScorerName, uniform
from kvcompress.recipe import BytesPolicy, Calibration, FastGenPolicy, Keep, Recipe

if TYPE_CHECKING:
    from kvcompress.profile.store import Profile

BYTES_TOLERANCE: Final = 0.02
RIVALS: Final = ("sink+recent int8", "random int8", "H2O int8")


@dataclass(frozen=True, slots=True)
class NamedPlan:
    """A row of the demo's table.

    Attributes:
        ships: this plan goes through export and load; the others are attached in memory.
    """

    name: str
    plan: Plan
    ships: bool = False


def demo_recipe(context_tokens: int, prompts: int) -> Recipe:
    """What the demo profiles, and the plan that it ships."""
    return Recipe(
        name="demo",
        description="A quarter of the bf16 KV bytes, spent where they buy most.",
        calibration=Calibration(prompts=prompts, tokens=context_tokens),
        keep=Keep(score_rows=None),
        policy=BytesPolicy(kind="bytes", keep_ratio=0.25, context=context_tokens),
    )


def demo_plans(profile: Profile, shape: ModelShape, recipe: Recipe) -> list[NamedPlan]:
    """The rows that are solved from the profile or keep every token; the 1/8 plan is the last."""
    from kvcompress.profile.solve import solve

    context = recipe.calibration.tokens
    keep = recipe.keep

    def bytes_plan(ratio: float) -> Plan:
        policy = BytesPolicy(kind="bytes", keep_ratio=ratio, context=context)
        return solve(profile, policy, keep)

    # at the paper's 0.95 nearly every head of so small a model stays full
    fastgen = FastGenPolicy(kind="fastgen", recovery=0.8)
    return [
        NamedPlan("int8", _uniform(shape, HeadPlan(full=True), keep, "int8, every token")),
        NamedPlan(
            "int4",
            _uniform(
                shape,
                HeadPlan(full=True, k_dtype="int4", v_dtype="int4"),
                keep,
                "int4, every token",
            ),
        ),
        NamedPlan(f"FastGen {fastgen.recovery:g} int8", solve(profile, fastgen, keep)),
        NamedPlan("byte plan 1/4", bytes_plan(0.25), ships=True),
        NamedPlan("byte plan 1/8", bytes_plan(0.125)),
    ]


def rivals(
    shape: ModelShape, keep: Keep, target_bytes: int, context_tokens: int
) -> list[NamedPlan]:
    """Simple policies, the same in every head, int8, at the `target_bytes` that a row measured."""

    def recent(tokens: int) -> Plan:
        head = HeadPlan(local=Budget(tokens=tokens))
        return _uniform(shape, head, keep, "sink and recent tokens")

    def drawn(tokens: int) -> Plan:
        head = HeadPlan(frequent=Budget(tokens=tokens))
        return _uniform(shape, head, keep, "random tokens", "random")

    def heavy(tokens: int) -> Plan:
        half = Budget(tokens=tokens // 2)
        head = HeadPlan(frequent=Budget(tokens=tokens - tokens // 2), local=half)
        return _uniform(shape, head, keep, "H2O, heavy hitters and recent tokens", "raw")

    return [
        NamedPlan(name, at_bytes(make, target_bytes, context_tokens))
        for name, make in zip(RIVALS, (recent, drawn, heavy), strict=True)
    ]


def at_bytes(make: Callable[[int], Plan], target_bytes: int, context_tokens: int) -> Plan:
    """The plan of `make(tokens)` whose bytes come nearest to `target_bytes`.

    Args:
        make: more tokens never take fewer bytes.

    Raises:
        PlanError: if none comes within `BYTES_TOLERANCE`.
    """

    def size(tokens: int) -> int:
        return kv_bytes(make(tokens), context_tokens, 1)

    low, high = 0, context_tokens
    while low < high:  # the first that reaches the target
        middle = (low + high) // 2
        if size(middle) < target_bytes:
            low = middle + 1
        else:
            high = middle
    best = min((max(0, low - 1), low), key=lambda tokens: abs(size(tokens) - target_bytes))
    if abs(size(best) - target_bytes) > BYTES_TOLERANCE * target_bytes:
        raise PlanError(
            f"no budget comes within {BYTES_TOLERANCE:.0%} of {target_bytes} bytes at "
            f"{context_tokens} tokens (nearest {size(best)}): use another target or context"
        )
    return make(best)


def _uniform(
    shape: ModelShape, head: HeadPlan, keep: Keep, target: str, scorer: ScorerName | None = None
) -> Plan:
    return uniform(
        shape,
        head,
        sink_tokens=keep.sink_tokens,
        recent_tokens=keep.recent_tokens,
        scorer=scorer or keep.scorer,
        score_rows=None if scorer else keep.score_rows,
        score_stride=None if scorer else keep.score_stride,
        target=target,
    )
