"""What follows from samples: bootstrap intervals of means, and the spread of a few rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Interval = tuple[float, float]
Estimate = tuple[float, Interval]
_RESAMPLES: Final = 2000


def interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `values` and the 95 % percentile interval of the mean under resampling.

    Raises:
        ValueError: for no values.
    """
    import numpy as np

    if not values:
        raise ValueError("no samples to score: ask for at least one")
    array: np.ndarray = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), (2.5, 97.5))
    return float(array.mean()), (float(low), float(high))


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """`interval` of ours minus theirs, resampling pairs.

    Raises:
        ValueError: for no pairs, or another number of samples on one side.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} samples against {len(theirs)}: pair outcomes of one suite")
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], seed)


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and inclusive quartiles; of a single value it is all three."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)
