"""Results on disk: cell after cell, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvcompress.atomic import write_file
from kvcompress.bench import process
from kvcompress.bench.result import Cell, Conditions, Result
from kvcompress.bench.run import conditions, today
from speed.model import words
from speed.workers import ROOT, Pythons

RESULTS: Final = ROOT / "benchmarks" / "results" / "speed"
RUNS: Final = ROOT / "runs" / "speed"


def parser_of(description: str | None, rounds: int, steps: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of every case")
    parser.add_argument("--steps", type=int, default=steps, help="steps timed together in a turn")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="of the model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    parser.add_argument("--buffer", type=int, default=1024, help="MiB read for the bandwidth")
    return parser


def rival_options(parser: argparse.ArgumentParser) -> None:
    """Where the rivals' environments are."""
    usual = Pythons()
    for name in ("quant", "kvpress", "vllm"):
        parser.add_argument(
            f"--{name}-python", type=Path, default=getattr(usual, name),
            help=f"interpreter of the environment with {name}",
        )  # fmt: skip
    parser.add_argument("--no-rivals", action="store_true", help="only what runs in this process")


def pythons_of(args: argparse.Namespace) -> Pythons:
    return Pythons(args.quant_python, args.kvpress_python, args.vllm_python)


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, then start again with glibc's thresholds raised if they are not."""
    args = parser.parse_args()
    threads = max(args.threads) if isinstance(args.threads, tuple) else args.threads
    os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    process.restart_tuned(threads)
    import torch

    torch.set_num_threads(threads)
    return args


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Book:
    """One benchmark's result, written after every cell, with the commands that measured its cells.

    Args:
        name: of the benchmark and its file.
        order: names of all cells, in which they are written.
    """

    def __init__(self, name: str, args: argparse.Namespace, order: Sequence[str]) -> None:
        self.path: Path = args.results / f"{name}.json"
        self._order = list(order)
        stated = conditions(words(args.scale), "cpu", process.malloc_words())
        before = None if args.fresh else _same(self.path, stated)
        self._command = command_words(name, args)
        self.result = Result(
            benchmark=name,
            command=self._command if before is None else before.command,
            date=today(),
            conditions=stated,
            frequency_mhz=process.frequency_mhz(),
            cells=() if before is None else before.cells,
        )

    def get(self, name: str, make: Callable[[], Cell]) -> Cell:
        """The cell `name`, measured now if it is not there."""
        found = self.result.cell(name)
        if found is not None:
            note(f"{name}: measured before; --fresh measures it again")
            return found
        cell = make()
        cells = {each.name: each for each in (*self.result.cells, cell)}
        order = [*self._order, *(each for each in cells if each not in self._order)]
        ordered = tuple(cells[each] for each in order if each in cells)
        commands = self.result.command.split("; ")
        commands += [] if self._command in commands else [self._command]
        update = {"cells": ordered, "command": "; ".join(commands)}
        self.result = self.result.model_copy(update=update)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, self.result.to_json())
        note(f"{name}: {cell.seconds:.0f} s")
        return cell


def command_words(name: str, args: argparse.Namespace) -> str:
    """The command line without folders and interpreters, which are somebody's own."""
    own = {str(value) for value in vars(args).values() if isinstance(value, Path)}
    given = [word for word in sys.argv[1:] if word not in own]
    kept = [word for word in given if not word.endswith("-python") and word != "--results"]
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])


def _same(path: Path, stated: Conditions) -> Result | None:
    """What was measured under the same conditions."""
    if not path.is_file():
        return None
    before = Result.load(path)
    return before if before.conditions == stated else None
