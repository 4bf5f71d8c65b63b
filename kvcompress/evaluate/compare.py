"""Several ways to hold the cache of one model, on one suite, beside its own full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.evaluate.quality import measure
from kvcompress.evaluate.report import QualityReport
from kvcompress.evaluate.suite import Suite
from kvcompress.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams


@dataclass(frozen=True, slots=True)
class Row:
    """A plan, its key constants (None: centre 0, scale 1) and the heading of its row."""

    name: str
    plan: Plan
    params: KVParams | None


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    rows: Sequence[Row],
    finished: Callable[[int], None] = lambda count: None,
) -> Iterator[QualityReport]:
    """The reference's report, then one for each of `rows`, as they are done.

    Args:
        finished: told the number of reports that are done.
    """
    reference = measure(model, tokenizer, suite)
    finished(1)
    yield reference.report
    for count, row in enumerate(rows, start=2):
        outcome = measure(
            model, tokenizer, suite, row.plan, row.params, reference=reference, name=row.name
        )
        finished(count)
        yield outcome.report


def plan_row(path: Path) -> Row:
    """The plan at `path`, with the key constants that lie beside it, if any.

    Args:
        path: plan.json, or a profile or bundle directory.

    Raises:
        PlanError: if the plan cannot be read.
        BundleError: if the constants beside it do not fit it.
    """
    from kvcompress.bundle.read import load_params

    plan = Plan.load(path)
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder / "kvcompress"):
        if (candidate / "kv_params.safetensors").is_file():
            params = load_params(candidate / "kv_params.safetensors", plan)
            return Row(plan.target, plan, params)
    return Row(plan.target, plan, None)
