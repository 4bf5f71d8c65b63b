"""Scorers by name, one line each: ``module:instance``.

The table is pure data, so that a recipe can be checked without loading torch;
`kvcompress.evict.scorers.scorer` imports the instance. A user's own scorer is registered as an
object, for this process.
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

# scorers whose scores are weighted sums of attention; a plan may estimate these sums
SUMS: Final = frozenset({"raw", "mean", "lift", "value", "critical"})


OWN: Final[dict[str, object]] = {}  # scorers of the user, see `kvcompress.register_scorer`


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
