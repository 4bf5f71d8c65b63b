"""Results in words: what each figure is, with its unit, so that a stranger can read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from kvcompress.cli.common import human_bytes

if TYPE_CHECKING:
    from kvcompress.bundle.inspect import Inspection
    from kvcompress.bundle.verify import VerifyReport
    from kvcompress.bundle.write import ExportReport
    from kvcompress.runtime.complete import Completion

_DIGITS = 16  # of a digest; JSON has all of them


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, words in rows:
        table.add_row(f" {what}", words)
    return table


def of_bf16(held_bytes: int, full_bytes: int) -> str:
    """``1.00 MiB, 25.0 % of the 4.00 MiB that 16 bits take``."""
    share = f"{100 * held_bytes / full_bytes:.1f} %" if full_bytes else "-"
    return f"{human_bytes(held_bytes)}, {share} of the {human_bytes(full_bytes)} that 16 bits take"


def exported(report: ExportReport) -> RenderableType:
    """What an export wrote and how it was checked."""
    rows = [
        ("bundle", f"{report.path}, {human_bytes(report.bundle_bytes)} in all"),
        (
            "weights",
            f"{human_bytes(report.weights_bytes)} of files in {report.weights_format}; the model "
            f"in 16 bits takes {human_bytes(report.base_weights_bytes)}",
        ),
    ]
    if report.planned_bytes is not None:
        rows.append(
            (
                "weights planned",
                f"{human_bytes(report.planned_bytes)} were planned, the tensors take "
                f"{human_bytes(report.tensor_bytes)}",
            )
        )
    if report.kept:
        rows.append(
            (
                "left in 16 bits",
                f"{len(report.kept)} linear layers, which the plan leaves so or whose sizes the "
                f"format does not take: {_some(report.kept)}",
            )
        )
    rows += [
        ("manifest", f"sha256 {report.digest[:_DIGITS]}…"),
        ("reload check", f"loaded again, {_apart(report.reload_error)} those before the save"),
        ("cache check", f"{_lossless(report.lossless_error)}"),
    ]
    return pairs(rows)


def verified(report: VerifyReport) -> RenderableType:
    """What was checked of a bundle."""
    rows = [
        ("files", f"{report.files}, each of the size and sha256 that the manifest says"),
        ("manifest", f"sha256 {report.digest[:_DIGITS]}…"),
        ("cache check", _lossless(report.lossless_error)),
        (
            "its own plan",
            f"{_apart(report.plan_error)} those of the full cache, on 48 tokens without meaning; "
            "no fault if large: kvcompress eval says what the plan costs on text",
        ),
    ]
    return pairs(rows)


def inspected(found: Inspection, glossary: Iterable[str]) -> RenderableType:
    """Bytes of a plan, head by head."""
    exact = found.sink_tokens + found.recent_tokens
    rows = [
        ("plan", f"{found.target}, for a {found.model_type} model"),
        ("at", f"{found.context_tokens} tokens in each of {found.batch} rows"),
        ("KV cache", of_bf16(found.kv_cache_bytes, found.bf16_kv_cache_bytes)),
        (
            "while prompts run",
            f"{human_bytes(found.prefill_bytes)} more, the full keys and values of one layer",
        ),
    ]
    if found.weights_format is not None and found.weights_bytes is not None:
        rows.append(("weights", f"{human_bytes(found.weights_bytes)} in {found.weights_format}"))
    rows.append(
        (
            "uncoded tokens",
            f"the first {found.sink_tokens} and the newest {found.recent_tokens}, {exact} tokens "
            "of every head, in the model's dtype",
        )
    )
    table = Table("layer", "KV head", "keeps", "stored as")
    for heading in ("KV cache", "of 16 bits"):
        table.add_column(heading, justify="right")
    for row in found.heads:
        head = "all" if row.head is None else str(row.head)
        keeps = "what its heads share" if row.head is None else row.keeps
        size, share = human_bytes(row.cache_bytes), f"{100 * row.share_of_bf16:.2f} %"
        table.add_row(str(row.layer), head, keeps, row.storage, size, share)
    return Group(pairs(rows), table, *glossary)


def completed(result: Completion) -> str:
    """Tokens and bytes of a completion, and why a short one saves nothing."""
    held, full = result.kv_cache_bytes, result.bf16_kv_cache_bytes
    line = (
        f"{result.prompt_tokens} tokens of prompt and {result.new_tokens} new ones; KV cache "
        f"{of_bf16(held, full)}"
    )
    if held < full:
        return line
    if result.pays_from_tokens is None:
        return f"{line}; this plan saves nothing at any length that the model reads"
    return (
        f"{line}; so short a text has nothing to compress, this plan saves bytes from "
        f"about {result.pays_from_tokens} tokens on"
    )


def _apart(error: float | None) -> str:
    return "not measured against" if error is None else f"logits differ by {100 * error:.2g} % from"


def _lossless(error: float) -> str:
    return f"a compressed cache that keeps everything: {_apart(error)} transformers' own cache"


def _some(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def table_of(rows: list[dict[str, Any]], *headings: str) -> Table:
    """Findings, one in a line; what has no entry is left empty."""
    table = Table(*headings)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table
