"""Workloads side by side: each way to hold the cache beside the reference, paired per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Final

from kvcompress.evaluate.compare import Row
from kvcompress.evaluate.workloads import KNOWN, WorkloadSuite
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.measure.stats import Interval, interval, paired
from kvcompress.measure.tables import terminal
from kvcompress.plan import StrictModel

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


REFERENCE: Final = "reference"
RANKED_FROM: Final = 0.6


def ranks(workload: str, reference: float | None) -> bool:
    """Whether scores say which cache is better, given the full cache's: what that cannot do, no
    other has lost. Beyond the trained length the full cache is itself lost."""
    known = KNOWN.get(workload)
    beyond = known is not None and known.beyond
    return beyond or reference is None or reference >= RANKED_FROM


class WorkloadRow(StrictModel):
    """One outcome beside the reference's.

    Attributes:
        score, score_interval: mean of the hits and its 95 % interval.
        difference, difference_interval: to the reference, paired per sample; None for itself.
    """

    name: str
    outcome: WorkloadOutcome
    score: float
    score_interval: Interval
    difference: float | None = None
    difference_interval: Interval | None = None


def compare_workloads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[WorkloadSuite],
    rows: Sequence[Row],
    finished: Callable[[int], None] = lambda count: None,
    batch_rows: int = 16,
) -> Iterator[WorkloadRow]:
    """Per suite the reference, then each of `rows`, as they are done.

    Args:
        finished: told the number of outcomes that are done.
    """
    from kvcompress.evaluate.workloads_run import reference_logits, run_workload

    count = 0
    for suite in suites:
        logits = reference_logits(model, tokenizer, suite, batch_rows=batch_rows)
        run = partial(
            run_workload, model, tokenizer, suite, batch_rows=batch_rows, reference=logits
        )
        reference = run()
        finished(count := count + 1)
        yield beside(REFERENCE, reference)
        for row in rows:
            outcome = run(row.plan, row.params)
            finished(count := count + 1)
            yield beside(row.name, outcome, reference)


def beside(
    name: str, outcome: WorkloadOutcome, reference: WorkloadOutcome | None = None
) -> WorkloadRow:
    """An outcome with its intervals."""
    score, score_interval = interval(outcome.hits, outcome.seed)
    row = WorkloadRow(name=name, outcome=outcome, score=score, score_interval=score_interval)
    if reference is None:
        return row
    difference, bounds = paired(outcome.hits, reference.hits, outcome.seed)
    return row.model_copy(update={"difference": difference, "difference_interval": bounds})


def workload_table(rows: Sequence[WorkloadRow]) -> Table:
    """One line per row, under the name of its workload; columns that no row fills are left out."""
    lines: list[dict[str, str | None]] = []
    before = None
    for row in rows:
        workload = row.outcome.workload
        if workload != before:
            known = row.name != REFERENCE or ranks(workload, row.score)
            note = "" if known else f", not ranked: below {RANKED_FROM:.0%} with the full cache"
            lines.append({"cache": f"{KNOWN[workload].axis} {workload}{note}"})
        lines.append(_cells(row))
        before = workload
    return terminal(lines, caption=_caption(rows), narrow=True)


def _cells(row: WorkloadRow) -> dict[str, str | None]:
    found = row.outcome
    perplexity = found.mean_perplexity
    return {
        "cache": f"  {row.name}",
        "of bf16": f"{found.kv_ratio:.3f}",
        "right": f"{100 * row.score:.1f}",
        "95 %": _range(row.score_interval),
        "difference": None if row.difference is None else f"{100 * row.difference:+.1f}",
        "95 % ": _range(row.difference_interval, "+"),
        "tokens": f"{fmean(found.output_tokens):.1f}",
        "nats": None if found.answer_nats is None else f"{fmean(found.answer_nats):.3f}",
        "KL": None if found.kl_nats is None else f"{fmean(found.kl_nats):.4f}",
        "ppl": None if perplexity is None else f"{perplexity:.2f}",
        "flips": None if found.flips is None else f"{100 * fmean(found.flips):.1f}",
    }


def _range(found: Interval | None, sign: str = "") -> str | None:
    if found is None:
        return None
    low, high = (f"{100 * end:{sign}.0f}" for end in found)
    return f"{low}…{high}" if sign else f"{low}-{high}"


def _caption(rows: Sequence[WorkloadRow]) -> str:
    outcomes = {row.outcome.workload: row.outcome for row in rows}
    lines = [
        f"{KNOWN[name].axis} {name}: {KNOWN[name].summary}; {found.context_tokens} tokens, "
        f"{len(found.hits)} samples."
        for name, found in outcomes.items()
    ]
    lines.append(
        "right: per cent of the answers, word for word; difference: to the reference, paired per "
        "sample; each with its 95 % bootstrap interval. tokens: generated or scored per sample. "
        "nats: −log p of a token of the true answer, where it is fed. of bf16: KV bytes held when "
        "the first question comes, as a share of the 16-bit cache. KL in nats per token and flips "
        "in per cent of the tokens, both to the reference, and perplexity (ppl): text behind a "
        "compressed prefix."
    )
    return "\n".join(lines)
