"""Pictures of the performance page, from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvcompress.bench.result import Cell, Result, Row
from pages.plots import GREY, INK, OURS, panels, pyplot, save

COLOURS: Final = {"ours": OURS[0], "peer": "#1f77b4", "artefact": GREY, "limit": "#cfcfcf"}


def draw_decode(result: Result, path: Path) -> None:
    """Milliseconds per token of every case, a panel per cell, with the floor of each."""
    tallest = max(len(cell.rows) for cell in result.cells)
    figure, flat = panels(len(result.cells), 2, (5.4, 0.2 * tallest + 1.1), 0, 0)
    for axes, cell in zip(flat, result.cells, strict=True):
        _bars(axes, cell)
    figure.suptitle("A decode step (bar), its quartiles (line), its floor (|)", x=0.01, ha="left")
    save(figure, path)


def _bars(axes: Any, cell: Cell) -> None:
    rows = sorted(cell.rows, key=lambda row: row.timing.wall.median)
    places = range(len(rows))
    axes.barh(
        places, [row.timing.wall.median for row in rows],
        color=[COLOURS[row.kind] for row in rows], height=0.7,
    )  # fmt: skip
    for place, row in zip(places, rows, strict=True):
        wall, floor = row.timing.wall, cell.floor_ms(row)
        axes.plot([wall.low, wall.high], [place, place], color=INK, lw=1.2)
        if floor is not None:
            axes.plot([floor], [place], marker="|", ms=8, color=INK, ls="")
    axes.set_yticks(list(places), [row.name for row in rows], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.set_title(cell.name, loc="left", fontsize=10)


def draw_kernel(cell: Cell, path: Path) -> None:
    """Bytes per second of every kernel, with the bandwidth of reading and copying."""
    figure, axes = pyplot().subplots(figsize=(8, 0.27 * len(cell.rows) + 1.4), layout="constrained")
    speeds = [(row.read_bytes or 0) / row.timing.wall.median / 1e6 for row in cell.rows]
    places = range(len(cell.rows))
    axes.barh(places, speeds, color=[COLOURS[row.kind] for row in cell.rows], height=0.7)
    styles = ((0, (1, 2)), (0, (4, 2)), (0, (6, 2, 1, 2)))
    for found, style in zip(cell.bandwidths, styles, strict=False):
        label = f"read, {found.threads} threads: {found.read_gb_s:.1f} GB/s"
        axes.axvline(found.read_gb_s, color=INK, lw=1, ls=style, label=label)
    axes.set_yticks(list(places), [row.name for row in cell.rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of what has to be read")
    axes.set_title(f"Attention of one token, {cell.name}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_fixed_memory(
    cell: Cell, rates: Sequence[tuple[Row, float, float | None]], path: Path
) -> None:
    """Tokens per second within the same bytes.

    Args:
        rates: per row, decoding alone and with prompts.
    """
    figure, axes = pyplot().subplots(figsize=(8, 0.42 * len(rates) + 1.3), layout="constrained")
    for place, (row, alone, served) in enumerate(rates):
        axes.barh(place - 0.18, alone, height=0.34, color=COLOURS[row.kind])
        if served is not None:
            axes.barh(place + 0.18, served, height=0.34, color=COLOURS[row.kind], alpha=0.45)
    names = [f"{row.name}, batch {row.batch}" for row, _, _ in rates]
    axes.set_yticks(range(len(rates)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s: decoding alone (dark), prompts included (light)")
    axes.set_title(f"The same KV bytes for all: {cell.name}", loc="left", fontsize=10)
    save(figure, path)


def draw_scaling(
    series: dict[str, list[Row]], lines: dict[str, tuple[float, float]], most: int, path: Path
) -> None:
    """Cost against context; what was not measured is dashed.

    Args:
        lines: per name start and slope of a line that fits.
        most: context to which lines are drawn.
    """
    figure, axes = pyplot().subplots(figsize=(8, 4.8), layout="constrained")
    shades = {"ours": ("#c1121f", "#f0717a", "#6f0a13", "#e9a1a6", "#ff7f0e", "#9467bd")}
    shades["peer"] = ("#1f77b4", "#17becf", "#2ca02c")
    used = {"ours": 0, "peer": 0}
    for name, rows in series.items():
        kind = "ours" if rows[0].kind == "ours" else "peer"
        colour = shades[kind][used[kind] % len(shades[kind])]
        used[kind] += 1
        xs = [row.context_tokens for row in rows]
        axes.plot(
            xs, [r.timing.wall.median for r in rows], marker="o", ms=4, color=colour, label=name
        )
        if name in lines:
            start, slope = lines[name]
            far = [xs[-1], most]
            axes.plot(far, [start + slope * x for x in far], color=colour, lw=1, ls=(0, (3, 2)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in the cache (dashed: a line through what was measured, not measured)")
    axes.set_ylabel("ms per step")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
