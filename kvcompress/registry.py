"""Scorers by name, one line each: ``module:instance``. Pure data, so that recipes can be checked
without loading torch; `kvcompress.evict.scorers.scorer` imports what a name stands for.

A scorer of the user's own is registered as the object that it is, for this process.
"""

from __future__ import annotations

from typing import Final

from kvcompress.errors import PlanError

_HERE: Final = "kvcompress.evict.scorers"

SCORERS: Final[dict[str, str]] = {
    "raw": f"{_HERE}.attention:RAW",
    "mean": f"{_HERE}.attention:MEAN",
    "lift": f"{_HERE}.attention:LIFT",
    "vote": f"{_HERE}.vote:VOTE",
    "corm": f"{_HERE}.vote:CORM",
    "tova": f"{_HERE}.tova:TOVA",
    "value": f"{_HERE}.value:VALUE",
    "critical": f"{_HERE}.critical:CRITICAL",
    "expected": f"{_HERE}.expected:EXPECTED",
    "key_diff": f"{_HERE}.key_diff:KEY_DIFF",
    "key_norm": f"{_HERE}.key_norm:KEY_NORM",
    "random": f"{_HERE}.random:RANDOM",
    "random_generated": f"{_HERE}.random:RANDOM_GENERATED",
    "kvzip": f"{_HERE}.kvzip:KVZIP",
    "kvzip_plus": f"{_HERE}.kvzip:KVZIP_PLUS",
    "surrogate": f"{_HERE}.surrogate:SURROGATE",
}

# of these, the ones whose scores are weighted sums of attention: a plan may have sums estimated
SUMS: Final = frozenset({"raw", "mean", "lift", "value", "critical"})


OWN: Final[dict[str, object]] = {}  # of the user, see `kvcompress.register_scorer`


def known_scorer(name: str) -> str:
    """`name`, if it is registered.

    Raises:
        ValueError: naming all that are.
    """
    if name not in SCORERS and name not in OWN:
        names = ", ".join(sorted({*SCORERS, *OWN}))
        raise ValueError(
            f"unknown scorer {name!r}; choose among {names}, or call kvcompress.register_scorer "
            "before you name one of your own"
        )
    return name


def place_of(name: str) -> tuple[str, str]:
    """(module, attribute) of a scorer of ours.

    Raises:
        PlanError: for a name that is not registered.
    """
    try:
        module, _, attribute = SCORERS[known_scorer(name)].partition(":")
    except ValueError as error:
        raise PlanError(str(error)) from None
    return module, attribute
