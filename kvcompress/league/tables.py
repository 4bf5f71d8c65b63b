"""The league's tables: entries by byte points, one for each workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.league.entries import Role
from kvcompress.league.result import Cell, League, Row, point_name
from kvcompress.league.tune import TOLERANCE
from kvcompress.league.verdicts import Standing, Verdicts, score, share
from kvcompress.measure.stats import interval

TableRow = dict[str, str]  # text by heading
_ORDER: Final[tuple[Role, ...]] = (
    "reference",
    "planned",
    "part",
    "published",
    "quantization",
    "recall",
    "own",
    "baseline",
)
LEGEND: Final = (
    "Tables: per cent answered word for word, 95 % interval behind it. **Bold**: on the Pareto "
    "front of its byte point, or tied with an entry of fewer bytes. "
    "b: labelled `baseline`. -: no plan so small. (x): measured share of the 16-bit bytes, where "
    "it is not that of the column."
)


def score_rows(league: League, verdicts: Verdicts, workload: str) -> list[TableRow]:
    """One row per entry, one column per point; a point's own bytes where it has others."""
    standings = {
        (standing.entry, verdict.point): standing
        for verdict in verdicts.points
        if verdict.workload == workload and verdict.ranked
        for standing in verdict.standings
    }

    def text(row: Row, cell: Cell) -> str:
        return _scored(cell, standings.get((row.name, cell.point or 0.0)), league)

    return _rows(league, workload, text)


def kl_rows(league: League, workload: str) -> list[TableRow]:
    """Mean KL in nats per token."""
    rows = mean_rows(league, workload, lambda outcome: outcome.kl_nats)
    references = {row.name for row in league.rows if row.role == "reference"}
    return [
        dict.fromkeys(row, "") | {"entry": row["entry"]} if row["entry"] in references else row
        for row in rows
    ]


def mean_rows(
    league: League, workload: str, of: Callable[[WorkloadOutcome], Sequence[float] | None]
) -> list[TableRow]:
    """Means of what `of` takes from an outcome; empty where that is None."""

    def text(row: Row, cell: Cell) -> str:
        assert cell.outcome is not None
        values = of(cell.outcome)
        return "" if values is None else f"{fmean(values):.4f}" + _own_bytes(cell)

    return _rows(league, workload, text)


def _rows(league: League, workload: str, text: Callable[[Row, Cell], str]) -> list[TableRow]:
    cells = {(c.entry, c.point): c for c in league.cells if c.workload == workload}
    fixed = any(cell.point is None for cell in cells.values())
    columns: list[float | None] = [*league.points, *([None] if fixed else [])]
    rows = []
    for row in sorted(league.rows, key=lambda row: _rank(league, row, cells)):
        shown = {"entry": row.name}
        for point in columns:
            cell = cells.get((row.name, point))
            if cell is None:
                words = ""
            elif cell.outcome is None:
                words = "-" if cell.unreachable else "failed"
            else:
                words = text(row, cell)
            shown[point_name(point)] = words
        rows.append(shown)
    return rows


def _rank(
    league: League, row: Row, cells: dict[tuple[str, float | None], Cell]
) -> tuple[int, float, str]:
    """By role, then the best mean over the points first."""
    scores = [
        score(cell)
        for point in (*league.points, None)
        if (cell := cells.get((row.name, point))) is not None and cell.outcome is not None
    ]
    return _ORDER.index(row.role), -fmean(scores) if scores else 0.0, row.name


def _scored(cell: Cell, standing: Standing | None, league: League) -> str:
    assert cell.outcome is not None
    _, (low, high) = interval(cell.outcome.hits, league.conditions.seed)
    number = f"{100 * score(cell):.1f}"
    if standing is not None and standing.place != "dominated":
        number = f"**{number}**"
    if standing is not None and standing.label == "baseline":
        number += " b"
    return f"{number} [{100 * low:.0f}, {100 * high:.0f}]" + _own_bytes(cell)


def _own_bytes(cell: Cell) -> str:
    """The measured share, where it is not the column's."""
    if cell.outcome is not None and cell.outcome.host_bytes:
        host = cell.outcome.host_bytes / cell.outcome.kv_bytes_bf16
        return f" ({share(cell):.3f} and {host:.3f} in host memory)"
    if cell.point is None or abs(share(cell) / cell.point - 1) > TOLERANCE:
        return f" ({share(cell):.3f})"
    return ""
