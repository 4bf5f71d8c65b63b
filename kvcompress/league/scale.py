"""One plan at several sizes: the rules by which every entry of the league is shrunk or grown.

1. Sinks and recent tokens, which stay in 16 bits, may take a third of the byte target. Where a
   recipe wants more, sinks shrink to a quarter of what is allowed, and recent tokens to the rest.
2. Ratios become tokens of the length at which bytes are counted, so that a short prompt followed
   by a long generation ends at the same bytes.
3. `frequent`, `local` and caps of all heads shrink or grow by one factor, rounded down; then layers
   get one more token per head, the first ones first, as long as the bytes allow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from kvcompress.plan import Budget, HeadPlan, Plan
from kvcompress.recipe import Keep

EXACT_SHARE: Final = 3  # sinks and recent tokens get one part in so many of the bytes
SINK_SHARE: Final = 4  # and sinks one part in so many of that, where it is not enough for both


def exact_tokens(
    sink_tokens: int, recent_tokens: int, share: float, length_tokens: int
) -> tuple[int, int]:
    """(sinks, recent tokens) under a target of `share` of the 16-bit bytes of `length_tokens`.

    At least one recent token remains, and a sink where the recipe has any.
    """
    allowed = int(share * length_tokens) // EXACT_SHARE
    if sink_tokens + recent_tokens <= allowed:
        return sink_tokens, recent_tokens
    sinks = min(sink_tokens, max(1, allowed // SINK_SHARE))
    return sinks, max(1, min(recent_tokens, allowed - sinks))


def keep_at(keep: Keep, share: float, length_tokens: int) -> Keep:
    """`keep` with its sinks and recent tokens by `exact_tokens`.

    Args:
        length_tokens: of the target, at most the trained length: profiles are taken within it.
    """
    sinks, recent = exact_tokens(keep.sink_tokens, keep.recent_tokens, share, length_tokens)
    return keep.model_copy(update={"sink_tokens": sinks, "recent_tokens": recent})


def in_tokens(plan: Plan, length_tokens: int) -> Plan:
    """`plan` with every ratio as the tokens that it grants a row of `length_tokens`."""

    def fixed(budget: Budget | None) -> Budget | None:
        return None if budget is None else Budget(tokens=budget.resolve(length_tokens))

    return _each_head(
        plan,
        lambda layer, head: head.model_copy(
            update={"frequent": fixed(head.frequent), "local": fixed(head.local)}
        ),
    )


def scaled(plan: Plan, factor: float, extra_layers: int = 0, most_tokens: int = 2**31) -> Plan:
    """`plan`, whose budgets are tokens, times `factor`.

    Args:
        extra_layers: so many of the first layers get one more token in each head that has a budget.
        most_tokens: no budget grows beyond this.
    """

    def times(tokens: int) -> int:
        return min(most_tokens, math.floor(tokens * factor + 1e-9))

    def head_at(layer: int, head: HeadPlan) -> HeadPlan:
        more = int(layer < extra_layers)
        new: dict[str, object] = {}
        for name in ("frequent", "local"):
            budget: Budget | None = getattr(head, name)
            if budget is not None and budget.tokens is not None:
                new[name] = Budget(tokens=min(most_tokens, times(budget.tokens) + more))
                more = 0
        if head.cap is not None:
            new["cap"] = max(1, times(head.cap))
        return head.model_copy(update=new)

    return _each_head(plan, head_at)


def has_budgets(plan: Plan) -> bool:
    """Whether `scaled` changes anything."""
    heads = [head for layer in plan.heads for head in layer]
    return any((head.frequent or head.local or head.cap) is not None for head in heads)


def keeps_all(plan: Plan) -> bool:
    """Whether no head drops a token."""
    return all(head.full for layer in plan.heads for head in layer)


def depends_on_text(plan: Plan) -> bool:
    """Whether prompts of one length may take different bytes."""
    classes = any(head.special or head.punct for layer in plan.heads for head in layer)
    return classes or plan.per_request is not None


def _each_head(plan: Plan, change: Callable[[int, HeadPlan], HeadPlan]) -> Plan:
    heads = tuple(
        tuple(change(layer, head) for head in row) for layer, row in enumerate(plan.heads)
    )
    return plan.model_copy(update={"heads": heads})
