"""A plan as a small table: what each KV head keeps, and how often each policy occurs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from kvcompress.accounting import kv_bytes
from kvcompress.plan import HeadPlan, Plan
from kvcompress.recipe import BytesPolicy, Policy, Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


def describe(head: HeadPlan) -> str:
    """Keep-set and storage: ``full int8``, ``special+punct k8v4``."""
    parts = (head.full, head.special, head.punct, head.frequent, head.local)
    return f"{head.label} {head.storage}" if any(parts) else head.label


def summary(plan: Plan, context_tokens: int, batch: int) -> dict[str, Any]:
    """The plan in numbers, for `--json`: bytes at a context and batch, heads by policy."""
    counts = Counter(describe(head) for layer in plan.heads for head in layer)
    held = kv_bytes(plan, context_tokens, batch)
    full = plan.model.bf16_kv_bytes(context_tokens, batch)
    return {
        "target": plan.target,
        "context_tokens": context_tokens,
        "batch": batch,
        "kv_bytes": held,
        "bf16_kv_bytes": full,
        "keep_ratio": held / full,
        "predicted_loss": plan.predicted_loss,
        "weights": list(plan.weights),
        "heads": [[describe(head) for head in layer] for layer in plan.heads],
        "counts": dict(counts.most_common()),
    }


def table(plan: Plan, context_tokens: int, batch: int) -> RenderableType:
    """The same as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table

    facts = summary(plan, context_tokens, batch)
    loss = facts["predicted_loss"]
    head = (
        f"{facts['target']}\n{facts['kv_bytes']:,} bytes of KV cache at {context_tokens} tokens, "
        f"batch {batch}: {facts['keep_ratio']:.3f} of bf16"
        + ("" if loss is None else f"; predicted loss {loss:.3g} nats per token")
    )
    grid = Table("layer", *(f"head {h}" for h in range(plan.model.kv_heads)))
    if plan.weights:
        grid.add_column("weights")
    for number, row in enumerate(facts["heads"]):
        grid.add_row(str(number), *row, *plan.weights[number : number + 1])
    counts = Table("policy", "heads")
    for name, count in facts["counts"].items():
        counts.add_row(name, str(count))
    return Group(head, grid, counts)


def planned_size(recipe: Recipe, policy: Policy | None = None) -> tuple[int, int]:
    """(context, batch) that a plan is shown at: its byte target's, else one calibration prompt."""
    policy = recipe.policy if policy is None else policy
    if isinstance(policy, BytesPolicy):
        return policy.context, policy.batch
    return recipe.calibration.tokens, 1
