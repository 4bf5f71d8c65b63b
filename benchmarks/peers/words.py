"""How records and their numbers are written on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

RIGHT = 1e-3  # an error below it is rounding
ALL = 0.999  # two scores may tie
NAMED = ("gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")  # by kvpress, as tested


def number(value: float) -> str:
    """An error: an order of magnitude where it is rounding, two digits where it is not."""
    if value == 0:
        return "0"
    return f"{value:.0e}" if value < 1e-3 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def span(values: Iterable[float]) -> str:
    """``2.1 to 3.4``, or one number."""
    found = sorted(values)
    low, high = number(found[0]), number(found[-1])
    return low if low == high else f"{low} to {high}"


def ran(records: Record) -> Record:
    return {k: v for k, v in records.items() if "error" not in v}


def failed(records: Record) -> Record:
    return {k: v for k, v in records.items() if "error" in v}


def only(records: Record, *parts: str) -> Record:
    """The records whose name has one of `parts`."""
    return {k: v for k, v in records.items() if any(part in k for part in parts)}


def most(records: Record, field: str = "gap") -> str:
    """``≤ 9e-06``, or 0."""
    largest = max(v[field] for v in records.values())
    return f"≤ {number(largest)}" if largest else "0"


def names(records: Iterable[str]) -> str:
    """All of them."""
    return ", ".join(records)


def errors(records: Record, chars: int = 90) -> list[str]:
    """Each different error once, with the names that it stopped."""
    by_text: dict[str, list[str]] = {}
    for name, record in failed(records).items():
        text = record["error"].replace("`", "'").replace("|", "/")
        text = text if len(text) <= chars else text[:chars].rsplit(" ", 1)[0] + " …"
        by_text.setdefault(text, []).append(name)
    return [f"{names(stopped)}: `{text}`" for text, stopped in by_text.items()]


def cell(*lines: str | list[str]) -> str:
    flat: list[str] = []
    for line in lines:
        flat += line if isinstance(line, list) else [line]
    return "<br>".join(flat)
