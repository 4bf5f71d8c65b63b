"""The plan that a profile made for the shipped model, carried over to another model's heads.

`planned.json` is that plan, as benchmarks/speed_quality.py solved it: an eighth of the 16-bit
bytes, spent where this model's profile says they buy most. Some heads keep every token in 4 bits,
others a window. What such a mixture costs in time is measured on the model of the benchmarks, whose
layers and heads take over the policy of the shipped model's at the same relative depth and place;
what it costs in quality, on the shipped model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvcompress.bench.plans import Setup, plan_of
from kvcompress.plan import ModelShape, Plan

PLAN: Final = Path(__file__).with_name("planned.json")
KEEP_RATIO: Final = 0.125
SCORE_ROWS: Final = 64


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
