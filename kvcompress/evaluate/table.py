"""Reports side by side, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcompress.evaluate.report import QUINTILES, QualityReport, Recall

if TYPE_CHECKING:
    from rich.table import Table


def comparison(reports: Sequence[QualityReport], title: str | None = None) -> Table:
    """One row per report; columns that no report fills are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = [_cells(report) for report in reports]
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = Table(
        title=title,
        title_justify="left",
        caption=_caption(reports),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in names:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*("-" if row[name] is None else str(row[name]) for name in names))
    return table


def breakdown(reports: Sequence[QualityReport]) -> Table:
    """Recall with the question visible by depth, answer length and task."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    recalls = [(report.name, report.visible) for report in reports if report.visible is not None]
    spans = list(dict.fromkeys(key for _, found in recalls for key in found.by_span))
    tasks = list(dict.fromkeys(key for _, found in recalls for key in found.by_task))
    table = Table(
        title="per cent recalled, question visible: by depth, by words to recall, by task",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("cache", no_wrap=True)
    for fifth in range(QUINTILES):
        low, high = (100 * place // QUINTILES for place in (fifth, fifth + 1))
        table.add_column(f"{low}-{high} %", justify="right", no_wrap=True)
    for heading in (*(f"{span} words" for span in spans), *tasks):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in recalls:
        values = [*found.by_depth, *(found.by_span.get(s) for s in spans)]
        values += [found.by_task.get(task) for task in tasks]
        table.add_row(name, *(_percent(value) or "-" for value in values))
    return table


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
