"""Scorers by name. One file per idea; `tests/evict/test_scorers.py` runs over this registry."""

from typing import Final

from kvcompress.evict.scorers.attention import LIFT, MEAN, RAW
from kvcompress.evict.scorers.base import Scorer
from kvcompress.evict.scorers.key_norm import KEY_NORM
from kvcompress.evict.scorers.random import RANDOM

SCORERS: Final[dict[str, Scorer]] = {s.name: s for s in (RAW, MEAN, LIFT, RANDOM, KEY_NORM)}

__all__ = ["SCORERS", "Scorer"]
