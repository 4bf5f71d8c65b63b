"""Attention kernels alone: bytes per second beside those that this machine reads and copies.

    python benchmarks/kernel.py
    python benchmarks/kernel.py --cells 4096x1 --threads 1

One step is the attention of one token in each of the model's layers, so that the codes of all of
them, and not of one, have to pass through the processor's caches. A step of ours also stores the
token; torch's does not. The linear layers of the model stand beside them. Writes
benchmarks/results/speed/kernel.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from speed import text
from speed.cases import Place, places
from speed.harness import Asked, Benchmark, Cases
from speed.layers import (
    GROUPED,
    PACKED,
    linears_entry,
    own_entry,
    own_layers,
    sdpa_entry,
    sdpa_pairs,
    with_threads,
)
from speed.model import COMPILED, INT8, Models, kernels_missing
from speed.plans import Setup, setups
from speed.text import best, mib, ms, percent, times

from kvcompress.bench.cell import Rounds
from kvcompress.bench.entries import Size
from kvcompress.bench.result import Cell, Missing, Result, Row, speedup

CELLS = "4096x1,16384x1"
LINEARS = "linear layers"
WHOLE = Setup("int8", "int8", 1.0)
SETUPS = setups((("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("model", "model")))
SDPA = (("float32", PACKED), ("float32", GROUPED), ("bfloat16", PACKED), ("bfloat16", GROUPED))


def more(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=(1, 2))
    parser.add_argument("--cells", type=places, default=places(CELLS), help="CONTEXTxBATCH, ...")


def cells(args: argparse.Namespace, models: Models, rounds: Rounds) -> Asked:
    asked: dict[str, Callable[[], Cases]] = {
        place.name: partial(attention, models, place, rounds, args.threads) for place in args.cells
    }
    return asked | {LINEARS: partial(linears, models, args.threads)}


def attention(models: Models, place: Place, rounds: Rounds, threads: tuple[int, ...]) -> Cases:
    """Torch's kernels and ours, each with every number of threads."""

    def size(count: int) -> Size:
        return Size(place.context_tokens, place.batch, rounds.room_tokens, count)

    pairs = {dtype: sdpa_pairs(models, dtype, size(1)) for dtype in ("float32", "bfloat16")}
    made = [
        sdpa_entry(models, pairs[dtype], dtype, grouping, size(count))
        for dtype, grouping in SDPA
        for count in threads
    ]
    for setup in SETUPS:
        cache, _ = own_layers(models, setup, size(1))
        made += [own_entry(models, cache, setup, size(count)) for count in threads]
    return made, []


def linears(models: Models, threads: tuple[int, ...]) -> Cases:
    """The model's linear layers in each format of weights."""
    reason = kernels_missing(INT8)
    formats = ["float32", "bfloat16", *([] if reason else [COMPILED, INT8])]
    made = [
        linears_entry(models, weights, Size(0, 1, 0, count))
        for weights in formats
        for count in threads
    ]
    left = [] if reason is None else [Missing(name=f"linears {INT8}", reason=reason)]
    return made, left


def report(result: Result) -> str:
    parts = [f"## {cell.name}\n\n{table(cell)}" for cell in result.cells]
    return "\n\n".join([*parts, "## Asked\n\n" + asked(result)])


def table(cell: Cell) -> str:
    """One row per kernel and number of threads."""
    headings = [
        "kernel", "MiB read", "ms, all layers [quartiles]", "GB/s", "of read", "of copy",
        "sdpa float32 =", "cpu/wall",
    ]  # fmt: skip
    return text.table(headings, [_cells(cell, row) for row in cell.rows])


def _cells(cell: Cell, row: Row) -> list[str]:
    speed = (row.read_bytes or 0) / row.timing.wall.median / 1e6
    found = cell.bandwidth(row.threads)
    rival = cell.row(with_threads(row.threads, f"sdpa float32, {PACKED}"))
    gain = (
        "" if rival is None or rival is row else f"{speedup(row.timing, rival.timing).median:.2f}x"
    )
    return [
        row.name + (" (artefact)" if row.kind == "artefact" else ""),
        mib(row.read_bytes or 0),
        ms(row.timing),
        f"{speed:.1f}",
        "" if found is None else percent(speed / found.read_gb_s),
        "" if found is None else percent(speed / found.copy_gb_s),
        gain,
        f"{row.timing.cpu_per_wall:.2f}",
    ]


def asked(result: Result) -> str:
    """int8 over every token against torch, against the bandwidth, and on a second core."""
    lines: list[list[str]] = []
    for cell in result.cells:
        if cell.name == LINEARS:
            continue
        for found in cell.bandwidths:
            lines += _against_torch(cell, found.threads)
        lines += _second_core(cell)
    return text.answers(lines)


def _against_torch(cell: Cell, threads: int) -> list[list[str]]:
    mine = cell.row(with_threads(threads, WHOLE.name))
    rival = best(cell, [with_threads(threads, f"sdpa float32, {how}") for how in (PACKED, GROUPED)])
    floor = None if mine is None else cell.floor_ms(mine)
    if mine is None or rival is None or floor is None:
        return [[cell.name, with_threads(threads, "int8 100 % against sdpa"), "not measured"]]
    share = percent(floor / mine.timing.wall.median)
    return [
        [
            cell.name,
            with_threads(threads, "int8 100 % against sdpa float32"),
            f"{times(speedup(mine.timing, rival.timing))}: {ms(mine.timing)} ms, "
            f"{ms(rival.timing)} ms ({rival.name})",
        ],
        [cell.name, with_threads(threads, "int8 100 %: share of read bandwidth"), share],
    ]


def _second_core(cell: Cell) -> list[list[str]]:
    lines = []
    for name in (WHOLE.name, f"sdpa float32, {PACKED}"):
        one, two = (cell.row(with_threads(count, name)) for count in (1, 2))
        if one is not None and two is not None:
            answer = (
                f"{times(speedup(two.timing, one.timing))}, cpu/wall {two.timing.cpu_per_wall:.2f}"
            )
            lines.append([cell.name, f"{name}: two threads against one", answer])
    first, second = (cell.bandwidth(count) for count in (1, 2))
    if first is not None and second is not None:
        gain = second.read_gb_s / first.read_gb_s
        answer = f"{gain:.2f}x ({first.read_gb_s:.1f} to {second.read_gb_s:.1f} GB/s)"
        lines.append([cell.name, "reading memory: two threads against one", answer])
    return lines


ORDER = [*(place.name for place in places(CELLS)), LINEARS]
RUN = Benchmark("kernel", __doc__, 9, 3, ORDER, cells, report, more)
if __name__ == "__main__":
    RUN.main()
