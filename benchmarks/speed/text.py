"""How figures are written: the same on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcompress.bench.result import Cell, Row, Timing, speedup
from kvcompress.measure.stats import Spread
from kvcompress.measure.tables import markdown

MIB = 2**20


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """All but the first column are numbers."""
    return markdown(headings, rows, numbers_from=1)


def answers(lines: Sequence[Sequence[str]]) -> str:
    """What was asked where, and what was found."""
    return markdown(["where", "asked", "answer"], lines)


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


def mark(row: Row) -> str:
    """What keeps a row from being an ordinary rival."""
    marks = {"artefact": " (artefact)", "limit": " (limit)"}
    own = " (own process" + (", real prompt)" if row.fill == "prompt" else ")")
    return marks.get(row.kind, "") + (own if row.process == "own" else "")


def remarks(cell: Cell) -> str:
    """Bandwidth, load, what was left out."""
    lines = [
        f"{threads_words(found.threads)} reads {found.read_gb_s:.1f} GB/s, copies "
        f"{found.copy_gb_s:.1f}; "
        for found in cell.bandwidths
    ]
    lines.append(
        f"load {load(cell.load_before)} before and {load(cell.load_after)} after; "
        f"{cell.rounds} rounds, {cell.warm_rounds} unrecorded before them."
    )
    text = "".join(lines)
    details = dict.fromkeys(f"{row.name}: {row.detail}" for row in cell.rows if row.detail)
    notes = [f"- {each}" for each in details]
    notes += [f"- not timed: {each.name}: {each.reason}" for each in cell.missing]
    return "\n".join([text, "", *notes]) if notes else text


def threads_words(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads together"


def sections(cells: Sequence[Cell], shown: Callable[[Cell], str], level: str = "##") -> list[str]:
    """One per cell: its table and the remarks."""
    return [f"{level} {cell.name}\n\n{shown(cell)}\n\n{remarks(cell)}" for cell in cells]
