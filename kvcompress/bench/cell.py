"""One cell of a benchmark: cases set up, timed in the same rounds, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kvcompress.bench.bandwidth import BUFFER_BYTES, Buffers
from kvcompress.bench.entries import Entry, Ready, synchronizer
from kvcompress.bench.result import Bandwidth, Cell, Missing, Row, Timing
from kvcompress.measure.machine import load_average, memory_bytes
from kvcompress.measure.timing import Samples, interleave

Note = Callable[[str], object]
SPARE_BYTES: Final = 3 * 2**29
_REASON_LENGTH: Final = 300


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often.

    Attributes:
        steps: of one window.
        warm_rounds: not recorded.
    """

    rounds: int
    steps: int
    warm_rounds: int = 1
    buffer_bytes: int = BUFFER_BYTES

    @property
    def room_tokens(self) -> int:
        """Steps that a case takes in all, untimed ones included."""
        return 1 + (self.rounds + self.warm_rounds) * (self.steps + 1)

    def windows(self, cases: int) -> int:
        return (self.rounds + self.warm_rounds) * cases


def run_cell(
    name: str,
    entries: Sequence[Entry],
    rounds: Rounds,
    *,
    threads: Sequence[int] = (1,),
    note: Note = lambda text: None,
    finished: Callable[[int], object] = lambda done: None,
    missing: Sequence[Missing] = (),
    device: torch.device | str = "cpu",
) -> Cell:
    """Set every entry up, time them together, and let them go.

    Args:
        threads: for each count the read and copy bandwidth is measured in the same rounds.
        missing: what was left out before.
        device: whose bandwidth is measured.

    Raises:
        Exception: as a case of ours raises it; a rival that fails is listed as missing.
    """
    start, before = time.perf_counter(), load_average()
    ready: list[Ready] = []
    left_out = list(missing)
    try:
        for entry in entries:
            note(f"{name}: setting up {entry.name}")
            made = _set_up(entry, left_out)
            if made is not None:
                ready.append(made)
        wait = synchronizer(torch.device(device))
        buffers = {count: Buffers(rounds.buffer_bytes, device) for count in threads}
        streams = [case for n in threads for case in buffers[n].cases(n, wait)]
        note(f"{name}: {rounds.rounds} rounds of {len(ready)} cases")
        found = interleave(
            [*(one.case for one in ready), *streams],
            rounds.rounds,
            rounds.steps,
            finished,
            rounds.warm_rounds,
        )
    finally:
        for one in ready:
            one.close()
    return Cell(
        name=name,
        rounds=rounds.rounds,
        warm_rounds=rounds.warm_rounds,
        load_before=before,
        load_after=load_average(),
        seconds=round(time.perf_counter() - start, 1),
        bandwidths=tuple(_bandwidth(buffers[n], n, found) for n in threads),
        rows=tuple(Row(**dict(one.facts), timing=Timing.of(found[one.case.name])) for one in ready),
        missing=tuple(left_out),
    )


def _set_up(entry: Entry, left_out: list[Missing]) -> Ready | None:
    free = memory_bytes("MemAvailable")
    if free is not None and entry.needs_bytes > free - SPARE_BYTES:
        reason = f"needs {entry.needs_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        left_out.append(Missing(name=entry.name, reason=reason))
        return None
    try:
        return entry.make()
    except Exception as error:  # a rival that does not run is a result, ours is a defect
        if entry.kind == "ours":
            raise
        text = " ".join(str(error).split()) or "no message"
        reason = f"{type(error).__name__}: {text}"[:_REASON_LENGTH]
        left_out.append(Missing(name=entry.name, reason=reason))
        return None


def _bandwidth(buffers: Buffers, threads: int, found: Mapping[str, Samples]) -> Bandwidth:
    return Bandwidth(
        threads=threads,
        read_bytes=buffers.read_bytes,
        read=Timing.of(found[f"read, {threads} threads"]),
        copied_bytes=buffers.copied_bytes,
        copy=Timing.of(found[f"copy, {threads} threads"]),
    )
