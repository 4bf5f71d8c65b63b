"""A plan as a small table: the keep-set of each KV head, and how often each keep-set occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from kvcompress.accounting import kv_bytes
from kvcompress.plan import HeadPlan, Plan
from kvcompress.recipe import BytesPolicy, Policy, Recipe
from kvcompress.storage import STORAGES

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

MEANINGS: Final[dict[str, str]] = {
    "full": "every token",
    "special": "the tokenizer's special tokens",
    "punct": "punctuation",
    "frequent": "the tokens that the scorer ranks highest",
    "local": "the newest tokens",
    **{name: storage.meaning for name, storage in STORAGES.items() if name != "model"},
    **{
        HeadPlan(k_dtype=k, v_dtype=v).storage: f"keys: {key.meaning}, values: {value.meaning}"
        for k, key in STORAGES.items()
        for v, value in STORAGES.items()
        if k != v
    },
    "model": STORAGES["model"].meaning,
}


def describe(head: HeadPlan) -> str:
    """Keep-set and storage: ``full int8``, ``special+punct k8v4``."""
    parts = (head.full, head.special, head.punct, head.frequent, head.local)
    return f"{head.label} {head.storage}" if any(parts) else head.label


def glossary(described: Iterable[str], sink_tokens: int, recent_tokens: int) -> str:
    """What the words of `describe` mean, those that occur."""
    used = set(" ".join(described).replace("sink+recent", "sink-recent").replace("+", " ").split())
    words = [f"{word}: {meaning}" for word, meaning in MEANINGS.items() if word in used]
    if used & {"frequent", "local"}:
        words.append(
            "0.25 is a share of the prompt's tokens, and at least the plan's min_tokens; 64t so "
            "many tokens"
        )
    exact = f"the first {sink_tokens} and the newest {recent_tokens} tokens, uncoded"
    if "sink-recent" in used:
        words.append(f"sink+recent: {exact}, and no other")
    return f"{'; '.join(words)}. Every head keeps {exact}."


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
        "bits": 16 * held / full,
        "predicted_loss": plan.predicted_loss,
        "predicted_recall_loss": plan.predicted_recall_loss,
        "weights": list(plan.weights),
        "heads": [[describe(head) for head in layer] for layer in plan.heads],
        "counts": dict(counts.most_common()),
    }


def table(plan: Plan, context_tokens: int, batch: int) -> RenderableType:
    """The same as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table

    facts = summary(plan, context_tokens, batch)
    loss, recalling = facts["predicted_loss"], facts["predicted_recall_loss"]
    head = (
        f"plan: {facts['target']}\n"
        f"KV cache: {facts['kv_bytes']:,} bytes at {context_tokens} tokens in each of {batch} "
        f"rows, {100 * facts['keep_ratio']:.1f} % of the {facts['bf16_kv_bytes']:,} that 16 bits "
        f"take: {facts['bits']:.2f} bits a number, scales, positions and uncoded tokens included"
    )
    if loss is not None:
        head += (
            f"\nexpected loss: {loss:.3g} nats per token (KL of the next token's probabilities to "
            "those with the full cache)"
        )
    if recalling is not None:
        head += f"; {recalling:.3g} where the text asks for what stands far above"
    grid = Table("layer", *(f"KV head {h}" for h in range(plan.model.kv_heads)))
    if plan.weights:
        grid.add_column("weights")
    for number, row in enumerate(facts["heads"]):
        grid.add_row(str(number), *row, *plan.weights[number : number + 1])
    counts = Table("what a KV head keeps", "heads")
    for name, count in facts["counts"].items():
        counts.add_row(name, str(count))
    words = glossary(facts["counts"], plan.sink_tokens, plan.recent_tokens)
    return Group(head, _IfItFits(grid), counts, words)


class _IfItFits:
    """A table, or one line in its place where its cells would be broken."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement

        wide = Measurement.get(console, options.update(max_width=10_000), self.table).maximum
        if wide <= options.max_width:
            yield self.table
        else:
            yield f"head by head it is {wide} columns wide: kvcompress inspect PLAN, or --json"


def planned_size(recipe: Recipe, policy: Policy | None = None) -> tuple[int, int]:
    """(context, batch) that a plan is shown at: its byte target's, else one calibration prompt."""
    policy = recipe.policy if policy is None else policy
    if isinstance(policy, BytesPolicy):
        return policy.context, policy.batch
    return recipe.calibration.tokens, 1
