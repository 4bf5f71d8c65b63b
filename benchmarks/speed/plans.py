"""Plans to time: every token or a share, in each storage, with budgets that differ by head.

The planned one is what a profile made for the shipped model, carried over to another model's heads.
`planned.json` is that plan, as benchmarks/speed_quality.py solved it: an eighth of the 16-bit
bytes, spent where this model's profile says they buy most. Some heads keep every token in 4 bits,
others a window. What such a mixture costs in time is measured on the model of the benchmarks, whose
layers and heads take over the policy of the shipped model's at the same relative depth and place;
what it costs in quality, on the shipped model itself.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvcompress.plan import Budget, HeadPlan, KVDtype, ModelShape, Plan

SPREAD: Final = 0.7  # of the logarithm of a head's budget, as measured plans have it
LOCAL_SHARE: Final = 0.2  # of a budget, for the newest tokens
_LEAST: Final = 0.01
PLAN: Final = Path(__file__).with_name("planned.json")
KEEP_RATIO: Final = 0.125
SCORE_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to hold a cache.

    Attributes:
        keep_ratio: mean share of the context that a head keeps in codes; 1 keeps every token.
    """

    k_dtype: KVDtype
    v_dtype: KVDtype
    keep_ratio: float

    @property
    def name(self) -> str:
        """``int8 20 %``."""
        return f"{_storage(self.k_dtype, self.v_dtype)} {100 * self.keep_ratio:g} %"


def setups(
    storages: tuple[tuple[KVDtype, KVDtype], ...] = (
        ("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("fp8", "fp8"), ("model", "model"),
    ),
    keep_ratios: tuple[float, ...] = (1.0, 0.2),
) -> list[Setup]:  # fmt: skip
    return [Setup(k, v, ratio) for k, v in storages for ratio in keep_ratios]


def plan_of(shape: ModelShape, setup: Setup, seed: int = 0) -> Plan:
    """The plan of `setup`; an evicting head ranks tokens by lift and keeps a window beside them.

    Args:
        seed: decides which head gets which budget.
    """
    heads = [shape.heads_of(layer) for layer in range(shape.layers)]
    if setup.keep_ratio >= 1:
        whole = HeadPlan(full=True, k_dtype=setup.k_dtype, v_dtype=setup.v_dtype)
        rows = tuple((whole,) * count for count in heads)
    else:
        ratios = iter(ragged_ratios(sum(heads), setup.keep_ratio, seed))
        rows = tuple(tuple(_evicting(setup, next(ratios)) for _ in range(n)) for n in heads)
    return Plan(
        model=shape,
        heads=rows,
        scorer="lift",
        score_rows=64,
        max_position=shape.max_position,
        target=setup.name,
    )


def ragged_ratios(count: int, mean: float, seed: int) -> list[float]:
    """`count` shares in (0, 1] with exactly this mean, log-normal before the bounds.

    Raises:
        ValueError: for a mean outside (0.02, 1).
    """
    if not 2 * _LEAST < mean < 1:
        raise ValueError(f"mean {mean}: give a share between {2 * _LEAST} and 1")
    draw = random.Random(seed)
    raw = [math.exp(draw.gauss(0.0, SPREAD)) for _ in range(count)]

    def bounded(factor: float) -> list[float]:
        return [min(1.0, max(_LEAST, factor * x)) for x in raw]

    low, high = 0.0, 1.0 / min(raw)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(bounded(middle)) < mean * count else (low, middle)
    return bounded(high)


def _evicting(setup: Setup, ratio: float) -> HeadPlan:
    return HeadPlan(
        frequent=Budget(ratio=ratio * (1 - LOCAL_SHARE)),
        local=Budget(ratio=ratio * LOCAL_SHARE),
        k_dtype=setup.k_dtype,
        v_dtype=setup.v_dtype,
    )


def _storage(k_dtype: KVDtype, v_dtype: KVDtype) -> str:
    if k_dtype == v_dtype:
        return "uncoded" if k_dtype == "model" else k_dtype
    return HeadPlan(full=True, k_dtype=k_dtype, v_dtype=v_dtype).storage


# ---- the planned one
@dataclass(frozen=True, slots=True)
class Planned:
    """Stands where a `Setup` does."""

    name: str = "planned 1/8"


PLANNED: Final = Planned()
Chosen = Setup | Planned


def plan_for(shape: ModelShape, chosen: Chosen) -> Plan:
    """The plan of a setup, or the planned one carried over."""
    if isinstance(chosen, Setup):
        return plan_of(shape, chosen)
    return carried_over(Plan.load(PLAN), shape)


def carried_over(plan: Plan, shape: ModelShape) -> Plan:
    """`plan` for a model of another number of layers and heads.

    Class tokens are left aside: random keys do not show which they are.
    """
    layers, heads = plan.model.layers, plan.model.kv_heads
    rows = tuple(
        tuple(
            plan.heads[layer * layers // shape.layers][head * heads // shape.kv_heads].model_copy(
                update={"special": False, "punct": False}
            )
            for head in range(shape.heads_of(layer))
        )
        for layer in range(shape.layers)
    )
    return Plan(
        model=shape,
        heads=rows,
        sink_tokens=plan.sink_tokens,
        recent_tokens=plan.recent_tokens,
        scorer=plan.scorer,
        score_rows=SCORE_ROWS,
        max_position=shape.max_position,
        target=PLANNED.name,
    )
