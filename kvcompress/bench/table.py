"""A benchmark's result as a table on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress.bench.result import Cell, Result, Row, speedup
from kvcompress.measure.tables import terminal

if TYPE_CHECKING:
    from rich.table import Table


def result_table(result: Result) -> Table:
    """One row per case of the only cell."""
    (cell,) = result.cells
    first = next((row for row in cell.rows if row.kind == "peer"), None)
    return terminal(
        [_cells(row, cell, first) for row in cell.rows],
        title=f"{result.conditions.model}: a decode step at {cell.name}",
        caption=_caption(result, cell),
    )


def _cells(row: Row, cell: Cell, first: Row | None) -> dict[str, str | None]:
    wall, floor = row.timing.wall, cell.floor_ms(row)
    times = None if first is None else speedup(row.timing, first.timing).median
    marks = {"artefact": " *", "limit": " (limit)"}
    return {
        "cache": row.name + marks.get(row.kind, ""),
        "KV MiB": f"{row.kv_bytes / 2**20:.1f}",
        "ms": f"{wall.median:.2f}",
        "quartiles": f"{wall.low:.2f}-{wall.high:.2f}",
        "tokens/s": f"{1e3 * row.batch / wall.median:.1f}",
        "-" if first is None else f"{first.name} =": None if times is None else f"{times:.2f}x",
        "floor ms": None if floor is None else f"{floor:.2f}",
        "of floor": None if floor is None else f"{100 * floor / wall.median:.0f} %",
        "cpu/wall": f"{row.timing.cpu_per_wall:.2f}",
    }


def _caption(result: Result, cell: Cell) -> str:
    told = result.conditions
    row = cell.rows[0]
    filled = "random keys and values" if row.fill == "synthetic" else "a prompt of random tokens"
    lines = [
        f"{told.cpu}, {told.cores} cores, device {told.device}, {row.threads} threads; load "
        f"{_load(cell.load_before)} before, {_load(cell.load_after)} after; malloc: {told.malloc}; "
        f"attention over codes: {told.kernels}.",
        f"{row.weights} weights; caches hold {filled}. Medians of {cell.rounds} interleaved rounds "
        f"of {row.timing.steps} steps; ratios are taken round by round.",
    ]
    for found in cell.bandwidths:
        lines.append(
            f"Floor: weights and cache read once at {found.read_gb_s:.1f} GB/s, measured in the "
            f"same rounds (copy {found.copy_gb_s:.1f}). Limit: the model with next to no cache."
        )
    lines += [f"* {row.detail}" for row in cell.rows if row.kind == "artefact"]
    lines += [f"Not timed: {each.name}: {each.reason}" for each in cell.missing]
    lines.append("Speed says nothing of quality: see kvcompress eval.")
    return "\n".join(lines)


def _load(values: tuple[float, ...]) -> str:
    return f"{values[0]:.1f}" if values else "unknown"
