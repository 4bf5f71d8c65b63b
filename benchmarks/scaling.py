"""What a decode step costs against context, to 128k tokens, and against the batch.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --contexts 1024,4096 --batches 1,4

Caches are synthetic; one that does not fit the memory is left out and said so. What the page says
of a million tokens is a line through the measured contexts, and called that. Writes
benchmarks/results/speed/scaling.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

from speed import text
from speed.cases import Place, limit_entry, own_entries, sorted_out, transformers_entry
from speed.harness import Asked, Benchmark, Cases, numbers
from speed.model import INT8, Models
from speed.plans import PLANNED, Chosen, Setup
from speed.text import mark, mib, ms, remarks

from kvcompress.bench.cell import Rounds
from kvcompress.bench.entries import Size
from kvcompress.bench.result import Result, Row

CONTEXTS = "1024,4096,16384,32768,65536,131072"
BATCHES = "1,2,4,8,16"
BATCH_CONTEXT = 2048
MILLION = 2**20
MOST_OFF = 0.2
OWN: tuple[tuple[Chosen, str], ...] = (
    (Setup("int8", "int8", 1.0), "float32"),
    (Setup("int8", "int8", 0.2), "float32"),
    (Setup("int8", "int8", 0.2), "bfloat16"),
    (Setup("int8", "int8", 0.2), INT8),
    (PLANNED, "bfloat16"),
    (Setup("int4", "int4", 0.2), "float32"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds of a step as a line in the context, by least squares of relative errors.

    Attributes:
        points: measured (context, median ms).
    """

    start_ms: float
    per_token_ms: float
    points: tuple[tuple[int, float], ...]

    def at(self, tokens: int) -> float:
        return self.start_ms + self.per_token_ms * tokens

    @property
    def fits(self) -> bool:
        """Whether it may say something of contexts that were not measured."""
        return self.per_token_ms > 0 and self.worst <= MOST_OFF

    @property
    def worst(self) -> float:
        """Largest relative distance of a measured point."""
        return max(abs(self.at(x) / y - 1) for x, y in self.points)


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", type=numbers, default=numbers(CONTEXTS))
    parser.add_argument("--batches", type=numbers, default=numbers(BATCHES))
    parser.add_argument("--batch-context", type=int, default=BATCH_CONTEXT)


def places_of(
    contexts: tuple[int, ...], batches: tuple[int, ...], batch_context: int
) -> dict[str, Place]:
    found = [Place(context, 1) for context in contexts]
    found += [Place(batch_context, batch) for batch in batches]
    return {place.name: place for place in found}


def cells(args: argparse.Namespace, models: Models, rounds: Rounds) -> Asked:
    def cases(place: Place) -> Cases:
        size = Size(place.context_tokens, place.batch, rounds.room_tokens, max(args.threads))
        return entries(models, size)

    asked = places_of(args.contexts, args.batches, args.batch_context)
    return {name: partial(cases, place) for name, place in asked.items()}


def entries(models: Models, size: Size) -> Cases:
    asked = [
        transformers_entry(models, "dynamic", "float32", size),
        transformers_entry(models, "static", "float32", size),
        transformers_entry(models, "static", "bfloat16", size),
        limit_entry(models, "float32", size),
    ]
    return sorted_out([*asked, *own_entries(models, size, OWN)])


def series(result: Result, batch: int | None = 1) -> dict[str, list[Row]]:
    """Rows of each name over contexts at one batch; None: over batches at one context."""
    rows = [row for cell in result.cells for row in cell.rows if row.kind != "limit"]
    context = batch_context(rows)
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.batch == batch if batch else row.context_tokens == context:
            found.setdefault(row.name, []).append(row)
    key = (lambda row: row.context_tokens) if batch else (lambda row: row.batch)
    return {name: sorted(rows, key=key) for name, rows in found.items()}


def batch_context(rows: list[Row]) -> int:
    """The context that was measured at the most batches."""
    batches: dict[int, set[int]] = {}
    for row in rows:
        batches.setdefault(row.context_tokens, set()).add(row.batch)
    return max(batches, key=lambda context: len(batches[context]), default=0)


def line_of(rows: list[Row]) -> Line | None:
    """Through three measured contexts or more; None for fewer."""
    points = tuple((row.context_tokens, row.timing.wall.median) for row in rows)
    if len({x for x, _ in points}) < 3:
        return None
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    above = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    below = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = above / below
    return Line(mean_y - slope * mean_x, slope, points)


def report(result: Result) -> str:
    parts = [
        "## Context, batch 1\n\n" + context_table(result),
        "## Batch\n\n" + batch_table(result),
        *(f"{cell.name}: {remarks(cell)}" for cell in result.cells),
    ]
    return "\n\n".join(parts)


def context_table(result: Result) -> str:
    """Medians by context; the last columns are computed, not measured."""
    found = series(result)
    contexts = sorted({row.context_tokens for rows in found.values() for row in rows})
    headings = [
        "cache, weights", *(f"{context} tokens, ms" for context in contexts),
        "KV MiB at the longest", "line: ms per 1000 tokens", "worst distance from it",
        "1M tokens, ms: extrapolated",
    ]  # fmt: skip
    rows = []
    for name, own in found.items():
        by_context = {row.context_tokens: row for row in own}
        line = line_of(own)
        shown = ["", "", ""]
        if line is not None:
            shown = [f"{1e3 * line.per_token_ms:.3f}", f"{100 * line.worst:.0f} %"]
            shown.append(f"{line.at(MILLION):.0f}" if line.fits else "no line fits")
        rows.append(
            [
                name + mark(own[0]),
                *(ms(by_context[c].timing) if c in by_context else "" for c in contexts),
                f"{mib(own[-1].kv_bytes)} ({own[-1].context_tokens} tokens)",
                *shown,
            ]
        )
    return text.table(headings, rows)


def batch_table(result: Result) -> str:
    """Tokens per second by batch."""
    found = series(result, None)
    batches = sorted({row.batch for rows in found.values() for row in rows})
    context = batch_context([row for rows in found.values() for row in rows])
    headings = [
        f"cache, weights, {context} tokens", *(f"batch {batch}, tokens/s" for batch in batches)
    ]  # fmt: skip
    rows = []
    for name, own in found.items():
        rate = {row.batch: 1e3 * row.batch / row.timing.wall.median for row in own}
        rows.append(
            [name + mark(own[0]), *(f"{rate[b]:.1f}" if b in rate else "" for b in batches)]
        )
    return text.table(headings, rows)


ORDER = [*places_of(numbers(CONTEXTS), numbers(BATCHES), BATCH_CONTEXT)]
RUN = Benchmark("scaling", __doc__, 7, 2, ORDER, cells, report, more)
if __name__ == "__main__":
    RUN.main()
