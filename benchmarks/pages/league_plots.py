"""Pictures of the league: score against bytes, one for each workload and all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcompress.league.result import Cell, League, point_name
from kvcompress.league.verdicts import score, share
from kvcompress.measure.stats import interval
from pages.plots import GREY, INK, OURS, panels, pyplot, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BYTES: Final = "KV bytes held, as a share of the 16-bit cache"
_SCORE: Final = "answers word for word"
_PART: Final = "#e9a1a6"
_CODES: Final = "#4a4a4a"
_COLOURS: Final = (
    "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#bcbd22", "#e377c2",
    "#3a5a40", "#5e60ce", "#b5838d", "#0a9396", "#ca6702", "#6d597a",
)  # fmt: skip
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
_LETTER: Final = 0.0082  # width of a letter of the codes' names, as a share of the axis
_BAND: Final = 1.03  # where these names begin
_LEVEL: Final = 0.033  # and the height of one
_BASE_DASHES: Final = {"sink-recent": (4, 2), "random": (1, 1.5), "key-norm": (6, 2, 1, 2)}


def draw_all(league: League, folder: Path, titles: dict[str, str]) -> None:
    """``NAME.png`` and ``NAME.svg`` for each workload, and ``overview`` with all of them.

    Args:
        titles: per workload, above its picture.
    """
    plt = pyplot()
    for workload in league.workloads:
        figure, axes = plt.subplots(figsize=(9.6, 5.6), layout="constrained")
        _draw(axes, league, workload, labelled=True)
        axes.set_title(titles[workload], loc="left", fontsize=11, color=INK)
        axes.set_xlabel(_BYTES)
        axes.set_ylabel(_SCORE)
        _legend(figure, axes, handlelength=2.4)
        save(figure, folder / workload)
    figure, flat = panels(len(league.workloads), 3, (4.1, 3.2), 2.2, 0.3)
    for axes, workload in zip(flat, league.workloads, strict=True):
        _draw(axes, league, workload, labelled=False)
        axes.set_title(titles[workload].split(":")[0], loc="left", fontsize=10, color=INK)
    figure.supxlabel(_BYTES, fontsize=9)
    figure.supylabel(_SCORE, fontsize=9)
    _legend(figure, flat[0])
    save(figure, folder / "overview")


def _draw(axes: Axes, league: League, workload: str, labelled: bool) -> None:
    """One workload; published methods in colour, baselines grey, planned ones on top."""
    roles = {row.name: row.role for row in league.rows}
    lines: dict[str, list[Cell]] = {}
    for cell in league.cells:
        # the bytes of a recall tier lie in two places, and `own` is ranked nowhere: in the tables
        drawn = cell.outcome is not None and roles[cell.entry] not in ("recall", "own")
        if cell.workload == workload and drawn:
            lines.setdefault(cell.entry, []).append(cell)
    published = [row.name for row in league.rows if row.role == "published"]
    ends: list[tuple[float, float, str, str]] = []
    codes: list[tuple[float, float, str]] = []
    for name, cells in lines.items():
        points = sorted((share(cell), score(cell)) for cell in cells)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        match roles[name]:
            case "reference":
                axes.axhline(ys[0], color=INK, lw=0.9, ls=(0, (1, 2)), zorder=1)
                axes.annotate(
                    "full cache", (0, ys[0]), xycoords=("axes fraction", "data"),
                    xytext=(2, 2), textcoords="offset points", fontsize=7.5, color=INK,
                )  # fmt: skip
            case "quantization":
                axes.plot(
                    xs, ys, ls="", marker="d", ms=5, color=_CODES, zorder=4,
                    label=None if codes else "every token, in codes",
                )  # fmt: skip
                codes.append((xs[0], ys[0], name))
            case "baseline":
                dashes = (0, _BASE_DASHES.get(name, (3, 1)))
                axes.plot(xs, ys, color=GREY, lw=1.4, ls=dashes, label=name, zorder=2)
            case "part":
                axes.plot(xs, ys, color=_PART, lw=1.2, marker=".", label=name, zorder=3)
            case "planned":
                colour = OURS[len(ends) % len(OURS)]
                _planned(axes, cells, name, colour)
                ends.append((xs[0], ys[0], name, colour))
            case _:
                number = published.index(name)
                axes.plot(
                    xs, ys, color=_COLOURS[number % len(_COLOURS)], lw=1.0, alpha=0.85,
                    marker=_MARKS[number % len(_MARKS)], ms=3.5, label=name, zorder=3,
                )  # fmt: skip
    most = max([*league.points, *(x for x, _, _ in codes)])
    codes.sort()
    left, right = min(league.points) * 0.82, most * 1.2
    levels = label_levels([(x, name) for x, _, name in codes], left, right)
    _axis(axes, league, (left, right), _BAND + _LEVEL * max([3, *levels]) if labelled else 1.06)
    if labelled:
        _label_ends(axes, ends)
        _label_codes(axes, codes, levels)


def _planned(axes: Axes, cells: Sequence[Cell], name: str, colour: str) -> None:
    """The line, with the 95 % interval of each point as a band."""
    ordered = sorted(cells, key=share)
    bounds = [interval(cell.outcome.hits)[1] for cell in ordered if cell.outcome is not None]
    xs = [share(cell) for cell in ordered]
    axes.fill_between(
        xs, [low for low, _ in bounds], [high for _, high in bounds], color=colour, alpha=0.10, lw=0
    )
    axes.plot(
        xs, [score(cell) for cell in ordered], color=colour, lw=2.4, marker="o", ms=5, label=name,
        zorder=5,
    )  # fmt: skip


def _axis(axes: Axes, league: League, ends: tuple[float, float], top: float) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter

    axes.set_xscale("log", base=2)
    axes.set_xlim(*ends)
    axes.set_xticks(league.points, [point_name(point) for point in league.points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.03, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#e6e6e6", lw=0.7, zorder=0)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names under the left ends of lines, one below another where lines begin together."""
    taken: list[float] = []
    for x, y, name, colour in sorted(ends, key=lambda end: -end[1]):
        place = y - 0.02
        while any(abs(place - at) < 0.045 for at in taken):
            place -= 0.045
        taken.append(place)
        axes.annotate(
            name, (x, y), xytext=(x * 1.03, place), fontsize=8.5, color=colour, va="top", zorder=6
        )


def label_levels(names: Sequence[tuple[float, str]], left: float, right: float) -> list[int]:
    """For each (x, name), from left to right: the lowest level, from 1, where it touches no other.

    Args:
        left, right: ends of the axis, which is logarithmic.
    """
    width = _LETTER * math.log(right / left)
    ends: list[float] = []
    levels = []
    for x, name in names:
        half = (len(name) + 1) * width / 2
        level = next((i for i, end in enumerate(ends) if end <= math.log(x) - half), len(ends))
        ends[level : level + 1] = [math.log(x) + half]
        levels.append(level + 1)
    return levels


def _label_codes(
    axes: Axes, codes: Sequence[tuple[float, float, str]], levels: Sequence[int]
) -> None:
    """Names in a band above 100 %, each joined to its point."""
    for (x, y, name), level in zip(codes, levels, strict=True):
        axes.annotate(
            name, (x, y), xytext=(x, _BAND + _LEVEL * (level - 1)), fontsize=7.5, color=_CODES,
            ha="center", va="bottom",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY, "shrinkA": 0},
        )  # fmt: skip


def _legend(figure: Any, axes: Any, **more: float) -> None:
    """Planned first, then what the picture draws on top of grey lines."""
    handles, names = axes.get_legend_handles_labels()
    first = dict.fromkeys(OURS, 0) | {_PART: 2, GREY: 3, _CODES: 4}
    order = sorted(
        range(len(names)), key=lambda i: (first.get(handles[i].get_color(), 1), names[i])
    )
    found = [handles[i] for i in order], [names[i] for i in order]
    figure.legend(*found, loc="outside right upper", frameon=False, fontsize=8, **more)
