"""How figures are written: the same on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress.bench.result import Cell, Row, Spread, Timing, speedup

MIB = 2**20


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table; with `numbers`, all but the first column stand right."""
    marks = ["---", *("---:" if numbers else "---" for _ in headings[1:])]
    lines = [headings, marks, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ms(timing: Timing) -> str:
    """``12.3 [12.1, 12.9]``."""
    return bracketed(timing.wall, 1 if timing.wall.median >= 10 else 2)


def times(found: Spread) -> str:
    """``2.61x [2.50, 2.70]``."""
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def bracketed(found: Spread, digits: int) -> str:
    return f"{found.median:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def mib(count_bytes: int) -> str:
    size = count_bytes / MIB
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}"


def load(values: tuple[float, ...]) -> str:
    return f"{values[0]:.1f}" if values else "unknown"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def against(row: Row, other: Row | None) -> str:
    """How many times as long the other took, nothing for itself."""
    if other is None or row is other:
        return ""
    return f"{speedup(row.timing, other.timing).median:.2f}x"


def of_floor(cell: Cell, row: Row) -> str:
    floor = cell.floor_ms(row)
    return "" if floor is None else f"{floor:.1f} ({percent(floor / row.timing.wall.median)})"


def best(cell: Cell, names: Sequence[str]) -> Row | None:
    """The fastest of these rows by median, None if none was timed."""
    rows = [row for row in (cell.row(name) for name in names) if row is not None]
    return min(rows, key=lambda row: row.timing.wall.median, default=None)
