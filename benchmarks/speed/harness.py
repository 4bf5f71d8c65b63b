"""How every speed benchmark runs: options, cells one after another, one file of results.

The file is written after every cell, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from kvcompress.atomic import write_file
from kvcompress.bench.cell import Rounds, run_cell
from kvcompress.bench.entries import Entry
from kvcompress.bench.result import Cell, Missing, Result
from kvcompress.bench.run import conditions
from kvcompress.measure import machine
from kvcompress.measure.cells import AbstractCells
from speed.malloc import restart_tuned
from speed.model import Models, words
from speed.workers import ROOT, Pythons

RESULTS: Final = ROOT / "benchmarks" / "results" / "speed"
RUNS: Final = ROOT / "runs" / "speed"
Cases = tuple[list[Entry], list[Missing]]
Asked = Mapping[str, Callable[[], Cases]]  # cell to what makes its cases


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One of the commands.

    Attributes:
        about: what it measures; the first line is for ``--help``.
        order: names of its usual cells, in which they are written.
        cells: from the command line, the models and how often everything is timed.
        report: every table, and what was asked, as text.
        more: adds options of its own.
        warm_rounds: not recorded.
    """

    name: str
    about: str | None
    rounds: int
    steps: int
    order: Sequence[str]
    cells: Callable[[argparse.Namespace, Models, Rounds], Asked]
    report: Callable[[Result], str]
    more: Callable[[argparse.ArgumentParser], object]
    warm_rounds: int = 1

    def options(self) -> argparse.ArgumentParser:
        parser = parser_of(self.about, self.rounds, self.steps)
        parser.add_argument(
            "--threads", type=numbers, default=(1,), help="numbers of them, with commas between"
        )
        self.more(parser)
        return parser

    def measure(self, args: argparse.Namespace) -> Result:
        """Every cell that was not measured before."""
        rounds = Rounds(args.rounds, args.steps, self.warm_rounds, args.buffer * 2**20)
        book = ResultBook(self.name, args, self.order)

        def measured(name: str, make: Callable[[], Cases]) -> Cell:
            made, missing = make()
            return run_cell(name, made, rounds, threads=args.threads, note=note, missing=missing)

        for name, make in self.cells(args, Models(args.scale), rounds).items():
            book.get(name, lambda name=name, make=make: measured(name, make))
        return book.result

    def main(self) -> None:
        print(self.report(self.measure(start(self.options()))))


def parser_of(about: str | None, rounds: int, steps: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
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


def numbers(text: str) -> tuple[int, ...]:
    """``1,2``: whole numbers."""
    found = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) for word in found):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers, with commas between")
    return tuple(int(word) for word in found)


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, then start again with glibc's thresholds raised if they are not."""
    args = parser.parse_args()
    threads = max(args.threads)
    os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    restart_tuned(threads)
    import torch

    torch.set_num_threads(threads)
    return args


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@final
class ResultBook(AbstractCells[Cell]):
    """One benchmark's `Result`, with the commands that measured its cells.

    Args:
        name: of the benchmark and its file.
        order: names of all cells, in which they are written.
    """

    def __init__(self, name: str, args: argparse.Namespace, order: Sequence[str]) -> None:
        self.note = note
        self.path: Path = args.results / f"{name}.json"
        self._order = list(order)
        stated = conditions(words(args.scale), "cpu", machine.malloc_words())
        before = None if args.fresh or not self.path.is_file() else Result.load(self.path)
        if before is not None and before.conditions != stated:
            before = None
        self._command = command_words(name, args)
        self.result = Result(
            benchmark=name,
            command=self._command if before is None else before.command,
            date=machine.today(),
            conditions=stated,
            frequency_mhz=machine.frequency_mhz(),
            cells=() if before is None else before.cells,
        )

    def find(self, name: str) -> Cell | None:
        found = self.result.cell(name)
        if found is not None:
            note(f"{name}: measured before; --fresh measures it again")
        return found

    def keep(self, name: str, cell: Cell) -> None:
        cells = {each.name: each for each in (*self.result.cells, cell)}
        order = dict.fromkeys([*self._order, *cells])
        ordered = tuple(cells[each] for each in order if each in cells)
        commands = dict.fromkeys([*self.result.command.split("; "), self._command])
        update = {"cells": ordered, "command": "; ".join(commands)}
        self.result = self.result.model_copy(update=update)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, self.result.to_json())


def command_words(name: str, args: argparse.Namespace) -> str:
    """The command line without folders and interpreters, which are somebody's own."""
    own = {str(value) for value in vars(args).values() if isinstance(value, Path)}
    given = [word for word in sys.argv[1:] if word not in own]
    kept = [word for word in given if not word.endswith("-python") and word != "--results"]
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])
