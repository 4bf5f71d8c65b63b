"""Runs a reader over mutants in processes of its own, so that a crash, a hang or a flood of memory
is found and named, and the search goes on behind it.

A target is a module of `tests.fuzz` with

    def prepare(folder: Path) -> Callable[[Random, Path], str]

which is called once in a process and gives a function that makes one mutant, reads it, and goes on
with what was read. It gives ``refused`` where the reader said so in an error that `refusal` takes,
``loaded`` where nothing went wrong, and raises whatever else it found.

A mutant follows from a run's seed and its number alone.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from kvcompress.errors import KVCompressError

ROOT: Final = Path(__file__).parents[2]
SECONDS: Final = 20  # for one mutant, which takes milliseconds
MEMORY_BYTES: Final = 1 << 30  # that one mutant may take beyond what the process has
_FAULTS: Final = 25  # after which a run stops: what they have in common comes first

Trial = Callable[[Random, Path], str]


@dataclass
class Found:
    """What became of the mutants.

    Attributes:
        endings: how many ended in which way.
        faults: (number of the mutant, what happened).
    """

    seed: int
    endings: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return sum(self.endings.values())

    def words(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(self.endings.items()))
        lines = [f"seed {self.seed}: {self.tried} mutants: {counts}"]
        return "\n".join([*lines, *(f"mutant {n}: {what}" for n, what in self.faults)])


def run(
    target: str,
    count: int,
    seed: int,
    first: int = 0,
    environment: dict[str, str] | None = None,
    tell: Callable[[Found], None] | None = None,
) -> Found:
    """Try the mutants `first` ≤ number < first + `count` of `seed`.

    Args:
        target: name of a module in `tests.fuzz`.
        environment: added to the one of the processes.
        tell: called with what was found so far, now and then.
    """
    found, stop = Found(seed), first + count
    while first < stop and len(found.faults) < _FAULTS:
        first = _run_once(target, first, stop, found, environment or {}, tell)
    return found


def _run_once(
    target: str,
    first: int,
    stop: int,
    found: Found,
    environment: dict[str, str],
    tell: Callable[[Found], None] | None,
) -> int:
    """One process; gives the number to go on from."""
    command = [sys.executable, "-m", "tests.fuzz.run", target, str(found.seed), str(first)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            [*command, str(stop)], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            env=variables,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            number = _follow(process.stdout, found, tell)
        code = process.wait()
        if code == 0 and number == stop:
            return stop
        log.seek(0)
        what = log.read().strip()
    if number < first:
        raise RuntimeError(f"{target} cannot be prepared (exit {code}): {what[-3000:]}")
    killed = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    found.endings["crashed"] += 1
    found.faults.append((number, f"{killed}: {what[-3000:]}"))
    return number + 1


def _follow(lines: Iterable[str], found: Found, tell: Callable[[Found], None] | None) -> int:
    """Count the endings that a process prints; gives the mutant that it was at last."""
    number = -1
    for line in lines:
        ending, number, what = json.loads(line)
        if ending == "begun":
            continue
        found.endings[ending] += 1
        number += 1
        if ending == "fault":
            found.faults.append((number - 1, what))
        if tell is not None and found.tried % 500 == 0:
            tell(found)
    return number


def trial_of(target: str, folder: Path) -> Trial:
    trial: Trial = importlib.import_module(f"tests.fuzz.{target}").prepare(folder)
    return trial


def refusal(error: KVCompressError, kind: type[KVCompressError], ending: str = "refused") -> str:
    """How a mutant ends that was refused.

    Raises:
        AssertionError: for another kind of error, or one that is not one short line.
    """
    text = str(error)
    assert isinstance(error, kind), f"a {type(error).__name__}: {text[:2000]}"
    assert "\n" not in text and len(text) < 1000, f"not one short line: {text[:2000]!r}"
    return ending


def attempt(trial: Trial, rng: Random, folder: Path) -> tuple[str, str]:
    """How one mutant ends, and for a fault what it was."""
    try:
        return trial(rng, folder), ""
    except BaseException:
        return "fault", traceback.format_exc(limit=-8)


def _limit_memory() -> None:
    """So that a flood ends in this process and not in the machine; a sanitizer maps terabytes."""
    if "ASAN_OPTIONS" in os.environ:
        return
    held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + 4 * MEMORY_BYTES,) * 2)


def _serve(target: str, seed: int, first: int, stop: int) -> None:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    report = os.fdopen(os.dup(1), "w")  # whatever else is printed goes to the log
    os.dup2(2, 1)

    def say(ending: str, number: int, what: str = "") -> None:
        print(json.dumps([ending, number, what]), file=report, flush=True)

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as name:
        trial = trial_of(target, Path(name))
        _limit_memory()
        for number in range(first, stop):
            # for a hang in C, where no alarm is heard, and for a reader that swallows the alarm
            faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            say("begun", number)
            signal.alarm(SECONDS)
            ending, what = attempt(trial, Random(f"{seed}:{number}"), Path(name))
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if grown > MEMORY_BYTES:
                ending, what = "fault", f"{grown} bytes more memory; it ended as {ending}: {what}"
            say(ending, number, what)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
