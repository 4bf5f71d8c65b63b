"""Scorers: one number per token and head, larger is kept. One file per idea.

`kvcompress.registry` lists them; `tests/evict/test_scorers.py` runs over that list.
"""

from __future__ import annotations

from importlib import import_module

from kvcompress.errors import PlanError
from kvcompress.evict.scorers.base import QueryRows, Scorer, Tokens, newest
from kvcompress.registry import OWN, SCORERS, place_of

__all__ = ["SCORERS", "QueryRows", "Scorer", "Tokens", "newest", "register_scorer", "scorer"]


def register_scorer(own: Scorer) -> Scorer:
    """Let recipes and plans of this process name a scorer of your own; gives it back.

    A plan holds the name alone: whoever loads it registers the scorer first.

    Raises:
        PlanError: for what is no `Scorer`, or a name that another scorer has.
    """
    if not isinstance(own, Scorer):
        raise PlanError(f"register_scorer: a {type(own).__name__} is no kvcompress Scorer")
    if not own.name.isidentifier():
        raise PlanError(f"register_scorer: {own.name!r} is no name of letters, digits and _")
    if own.name in SCORERS or OWN.get(own.name, own) is not own:
        raise PlanError(f"register_scorer: there is another scorer {own.name!r}; rename yours")
    OWN[own.name] = own
    return own


def scorer(name: str) -> Scorer:
    """The scorer registered as `name`.

    Raises:
        PlanError: for a name that is not registered, or an entry that is not a scorer.
    """
    own = OWN.get(name)
    if isinstance(own, Scorer):
        return own
    module, attribute = place_of(name)
    found = getattr(import_module(module), attribute, None)
    if not isinstance(found, Scorer) or found.name != name:
        raise PlanError(f"scorer {name!r}: {module}:{attribute} is not a Scorer of that name")
    return found
