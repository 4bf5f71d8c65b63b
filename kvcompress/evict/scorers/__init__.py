"""Scorers: one number per token and head, larger is kept. One file per idea.

`kvcompress.registry` lists them; `tests/evict/test_scorers.py` runs over that list.
"""

from __future__ import annotations

from importlib import import_module

from kvcompress.evict.scorers.base import Rows, Scorer, Tokens, newest
from kvcompress.registry import SCORERS, place_of

__all__ = ["SCORERS", "Rows", "Scorer", "Tokens", "newest", "scorer"]


def scorer(name: str) -> Scorer:
    """The scorer registered as `name`.

    Raises:
        PlanError: for a name that is not registered, or an entry that is not a scorer.
    """
    from kvcompress.errors import PlanError

    module, attribute = place_of(name)
    found = getattr(import_module(module), attribute, None)
    if not isinstance(found, Scorer) or found.name != name:
        raise PlanError(f"scorer {name!r}: {module}:{attribute} is not a Scorer of that name")
    return found
