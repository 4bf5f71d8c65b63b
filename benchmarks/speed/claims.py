"""Statements that a benchmark was built to decide, each from rows of one cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompress.bench.result import Cell, Result, speedup
from speed.text import best, ms, percent, times


@dataclass(frozen=True, slots=True)
class Claim:
    """The fastest of ours against the fastest of theirs, or against the floor.

    Attributes:
        cell: its name.
        title: what is asked.
        ours: names of rows.
        theirs: names of rows; empty stands for the floor of what the first needs.
    """

    cell: str
    title: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...] = ()

    def answer(self, result: Result) -> str:
        """``2.61x [2.50, 2.70]: 80.1 ms (int8 20 %, float32) ...``, or why there is none."""
        cell = result.cell(self.cell)
        if cell is None:
            return "not measured"
        mine = best(cell, self.ours)
        if mine is None:
            return f"not measured: {_why(cell, self.ours)}"
        shown = f"{ms(mine.timing)} ms ({mine.name})"
        if not self.theirs:
            floor = cell.floor_ms(mine)
            if floor is None:
                return "not measured: no bandwidth"
            return (
                f"{percent(floor / mine.timing.wall.median)} of the floor: {shown}, {floor:.1f} ms"
            )
        other = best(cell, self.theirs)
        if other is None:
            return f"not measured: {_why(cell, self.theirs)}"
        found = times(speedup(mine.timing, other.timing))
        return f"{found}: {shown}, {ms(other.timing)} ms ({other.name})"


def answers(result: Result, claims: Sequence[Claim]) -> list[tuple[str, str, str]]:
    """(cell, title, answer) of every claim."""
    return [(claim.cell, claim.title, claim.answer(result)) for claim in claims]


def _why(cell: Cell, names: Sequence[str]) -> str:
    found = [each.reason for each in cell.missing if each.name in names]
    return found[0] if found else f"no row {names[0]}"
