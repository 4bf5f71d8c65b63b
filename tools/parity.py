"""How exactly the compressed cache computes each family of models, measured on tiny ones.

    python tools/parity.py [--families llama,gemma2] [--json FILE] [--markdown FILE]

V1: budgets beyond the context against transformers' DynamicCache, in every way of calling a model.
V2: evicted tokens against the same tokens hidden from a model that keeps everything.
V7, V8: drafts and held prompts under eviction against plain decoding and a prompt fed at once.
Prints the largest difference of a logit; exits with 1 where one is above its bar.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvcompress.runtime.model.families import shape_of
from tests.runtime.battery import BAR, DTYPE_BAR, TABLES, Outcome, measure
from tests.runtime.models import CONFIGS, FAMILIES

Figures = dict[str, dict[str, dict[str, Outcome]]]  # table, family, column
NOTES = {
    "V1": "Largest difference of a logit from DynamicCache with budgets beyond the context, "
    f"float32; the bar is {BAR:g} and equal tokens. bfloat16 and float16: error against float32 "
    f"with the same weights, in units of DynamicCache's own error; the bar is {DTYPE_BAR:g}.",
    "V2": "Largest difference of a logit from a model that keeps every token and has the evicted "
    f"ones masked with −inf, per head; the bar is {BAR:g}.",
    "V7, V8": "Under a plan that evicts: drafted tokens against plain decoding, and a prompt in "
    f"chunks that is held until it ends against one fed at once; the bar is {BAR:g}.",
}


def versions() -> dict[str, str]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
    }


def cell(outcome: Outcome) -> str:
    """``2e-6``, ``0.97`` for a ratio, ``–`` where nothing is claimed; a ``!`` marks a failure."""
    if outcome.note:
        text = "–" if outcome.expected else "error"
    elif math.isinf(outcome.error):
        text = "tokens"
    elif outcome.bar == DTYPE_BAR:
        text = f"{outcome.error:.2f}"
    else:
        text = f"{outcome.error:.0e}".replace("e-0", "e-")
    return text if outcome.passed else f"{text}!"


def remarks(rows: dict[str, dict[str, Outcome]]) -> list[str]:
    """What stands behind every cell without a figure, and behind every failure."""
    found: dict[str, list[str]] = {}
    for family, row in rows.items():
        for column, outcome in row.items():
            reason = outcome.note
            if not reason and not outcome.passed:
                reason = "above the bar"
                if outcome.error <= outcome.bar:
                    reason = f"says nothing: eviction moves the logits by {outcome.moved:.0e}"
            if reason:
                found.setdefault(reason, []).append(f"{family} {column}")
    return [f"{', '.join(cells)}: {reason}" for reason, cells in found.items()]


def measured(table: str, family: str, column: str) -> Outcome:
    """The figure; an error that the battery does not foresee is a failure of the cell."""
    try:
        return measure(table, family, column)
    except Exception as error:  # the other cells still count
        return Outcome(math.nan, note=f"{type(error).__name__}: {error}")


def measure_all(families: list[str]) -> Figures:
    total = len(families) * sum(map(len, TABLES.values()))
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    figures: Figures = {table: {} for table in TABLES}
    with Progress(
        *columns, TimeRemainingColumn(), console=screen, disable=not screen.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        for family in families:
            bar.update(task, description=family)
            if not screen.is_terminal:
                print(family, file=sys.stderr, flush=True)
            for table, names in TABLES.items():
                figures[table][family] = {}
                for name in names:
                    figures[table][family][name] = measured(table, family, name)
                    bar.advance(task)
    return figures


def print_tables(figures: Figures) -> None:
    """rich tables on a terminal, aligned columns elsewhere."""
    screen = Console(highlight=False, markup=False)
    for table, rows in figures.items():
        print(f"\n{table}: {NOTES[table]}")
        names = list(TABLES[table])
        lines = [[family, *map(cell, row.values())] for family, row in rows.items()]
        if screen.is_terminal:
            shown = Table("family", *names, padding=(0, 0), collapse_padding=True)
            for line in lines:
                shown.add_row(*line)
            screen.print(shown)
        else:
            print_plain([["family", *names], *lines])
        print("\n".join(remarks(rows)))


def print_plain(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip())


def layers_of(family: str) -> str:
    """``2 sliding, 2 full``."""
    shape = shape_of(CONFIGS[family]())
    counts = Counter(shape.kind(layer) for layer in range(shape.layers))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def markdown(figures: Figures) -> str:
    found = versions()
    lines = [
        "# Model families",
        "",
        "Made by `tools/parity.py` on tiny models with random, sharpened weights "
        f"(transformers {found['transformers']}, torch {found['torch']}, CPU, one thread).",
        "–: nothing is claimed; the reason stands below the table.",
        "",
        "| family | layers |",
        "|---|---|",
        *(f"| {family} | {layers_of(family)} |" for family in figures["V1"]),
    ]
    for table, rows in figures.items():
        names = list(TABLES[table])
        lines += ["", f"## {table}", "", NOTES[table], ""]
        lines += ["| family | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for family, row in rows.items():
            lines.append(f"| {family} | " + " | ".join(map(cell, row.values())) + " |")
        notes = remarks(rows)
        lines += [""] * bool(notes) + [f"- {line}" for line in notes]
    return "\n".join(lines) + "\n"


def as_json(figures: Figures) -> dict[str, Any]:
    def plain(outcome: Outcome) -> dict[str, Any]:
        values = {**asdict(outcome), "passed": outcome.passed}
        return {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in values.items()
        }

    return {
        "versions": versions(),
        "tables": {
            table: {
                family: {column: plain(outcome) for column, outcome in row.items()}
                for family, row in rows.items()
            }
            for table, rows in figures.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    unknown = sorted(set(args.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown families {', '.join(unknown)}; give some of {', '.join(FAMILIES)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    figures = measure_all(args.families)
    print_tables(figures)
    if args.json:
        args.json.write_text(json.dumps(as_json(figures), indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(figures), encoding="utf-8")
    outcomes = [o for rows in figures.values() for row in rows.values() for o in row.values()]
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"\n{failed} of {len(outcomes)} figures above their bar")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
