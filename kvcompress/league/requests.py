"""The dials of plans that decide anew for each request: their bytes are known once measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from kvcompress.plan import FastGenChoice, Plan, Threshold

CAP_ROOM: Final = 2.0  # a threshold's hard cap, over the target: heads may differ that much
_SLOPE: Final = 2.0
_UNITS: Final = 8.0  # differences are steps of one, or of this part of a larger threshold


def request_dial(plan: Plan) -> Callable[[float], Plan] | None:
    """The plan at a value in (0, 1), more bytes at larger ones; None for a plan without a dial.

    FastGen's choice turns its recovery. A threshold moves by factors where it is positive, as for
    shares of attention, and by differences elsewhere, as for logarithms.
    """
    rule = plan.per_request

    def ruled(new: FastGenChoice | Threshold) -> Plan:
        return plan.model_copy(update={"per_request": new})

    if isinstance(rule, FastGenChoice):
        return lambda value: ruled(rule.model_copy(update={"recovery": value}))
    if isinstance(rule, Threshold):
        return lambda value: ruled(
            rule.model_copy(update={"at_least": _moved(rule.at_least, value)})
        )
    return None


def _moved(at_least: float, value: float) -> float:
    step = _SLOPE * math.log(value / (1 - value))
    if at_least > 0:
        return at_least * math.exp(-step)
    return at_least - step * max(1.0, -at_least / _UNITS)
