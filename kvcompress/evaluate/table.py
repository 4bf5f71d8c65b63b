"""Reports side by side, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcompress.evaluate.report import QUINTILES, QualityReport, Recall
from kvcompress.measure.tables import terminal

if TYPE_CHECKING:
    from rich.table import Table


def comparison(reports: Sequence[QualityReport], title: str | None = None) -> Table:
    """One row per report; columns that no report fills are left out."""
    return terminal([_cells(report) for report in reports], title=title, caption=_caption(reports))


def breakdown(reports: Sequence[QualityReport]) -> Table:
    """Recall with the question visible by depth, answer length and task."""
    recalls = [(report.name, report.visible) for report in reports if report.visible is not None]
    spans = list(dict.fromkeys(key for _, found in recalls for key in found.by_span))
    tasks = list(dict.fromkeys(key for _, found in recalls for key in found.by_task))
    fifths = [100 * place // QUINTILES for place in range(QUINTILES + 1)]
    rows = []
    for name, found in recalls:
        row: dict[str, str | None] = {"cache": name}
        for low, high, share in zip(fifths, fifths[1:], found.by_depth, strict=False):
            row[f"{low}-{high} %"] = _percent(share) or "-"
        row |= {f"{span} words": _percent(found.by_span.get(span)) for span in spans}
        row |= {task: _percent(found.by_task.get(task)) for task in tasks}
        rows.append(row)
    return terminal(
        rows, title="per cent recalled, question visible: by depth, by words to recall, by task"
    )


def _cells(report: QualityReport) -> dict[str, str | None]:
    text = report.text
    return {
        "cache": report.name,
        "KV KiB": f"{report.kv_bytes / 1024:.0f}",
        "of bf16": f"{report.kv_ratio:.3f}",
        "visible": _percent(report.visible.exact if report.visible else None),
        "95 %": _interval(report.visible),
        "hidden": _percent(report.hidden.exact if report.hidden else None),
        "keys": _percent(report.visible.multi_key if report.visible else None),
        "KL": f"{text.kl_nats:.4f}" if text else None,
        "ppl": f"{text.perplexity:.2f}" if text else None,
        "weights": f"{report.weights_bytes / 2**20:.1f} MiB",
    }


def _caption(reports: Sequence[QualityReport]) -> str:
    first = reports[0]
    lines = [f"KV measured after {first.context_tokens} tokens, batch 1, metadata included."]
    if first.visible is not None:
        lines.append(
            f"visible, hidden: per cent of {first.visible.samples} answers recalled word for "
            "word, with the question in the prompt, or asked after the document was compressed "
            "alone; 95 %: interval of visible."
        )
        if first.visible.multi_key is not None:
            lines.append("keys: per cent right where several are asked one after another.")
    if first.text is not None:
        lines.append(
            f"KL to the first row in nats per token, and perplexity: {first.text.tokens} tokens of "
            "held-out text behind a compressed prefix."
        )
    predicted = [
        f"{each.name} {each.kl_predicted:.4f}"
        for each in reports
        if each.kl_predicted is not None and each.text is not None
    ]
    if predicted:
        lines.append(f"KL that the plans' profiles predicted: {', '.join(predicted)}.")
    return "\n".join(lines)


def _interval(found: Recall | None) -> str | None:
    if found is None:
        return None
    return f"{100 * found.interval[0]:.0f}-{100 * found.interval[1]:.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}"
