"""Interleaved timing: windows of a few steps, A B C … A B C …, in wall time and processor time.

Needs nothing but the standard library, so that environments without kvcompress can import it.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Window:
    """What a few consecutive steps of one case took together.

    Attributes:
        faults: minor page faults; memory that comes fresh from the system costs one per page.
    """

    steps: int
    wall_s: float
    cpu_s: float
    faults: int = 0


# runs so many steps and says what they took
MeasureWindow = Callable[[int], Window]


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time; `measure` runs its own untimed step first where it needs one."""

    name: str
    measure: MeasureWindow


@dataclass(slots=True)
class Samples:
    """Windows of one case, in the order of the rounds."""

    windows: list[Window] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(window.steps for window in self.windows)

    def wall_ms(self) -> tuple[float, ...]:
        """Milliseconds of one step, a figure per round."""
        return tuple(1e3 * w.wall_s / w.steps for w in self.windows)

    def cpu_ms(self) -> tuple[float, ...]:
        """As `wall_ms`, of processor time over all threads of the process."""
        return tuple(1e3 * w.cpu_s / w.steps for w in self.windows)

    def faults(self) -> tuple[int, ...]:
        """Minor page faults of one step, a figure per round."""
        return tuple(round(w.faults / w.steps) for w in self.windows)


def stopwatch(step: Step, steps: int, wait: Callable[[], object] | None = None) -> Window:
    """Time `steps` calls of `step` together, without garbage collection in between.

    Args:
        wait: returns when the device has done all that was asked of it; None where nothing queues.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        if wait is not None:
            wait()
        before = _faults()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        if wait is not None:
            wait()
        return Window(
            steps, time.perf_counter() - wall, time.process_time() - cpu, _faults() - before
        )
    finally:
        if collected:
            gc.enable()


def case_of(
    name: str,
    step: Step,
    *,
    prepare: Step | None = None,
    warm: bool = True,
    wait: Callable[[], object] | None = None,
) -> Case:
    """A case of this process.

    Args:
        prepare: untimed, before every window.
        warm: run one untimed step before every window, which brings its weights back to the
            processor's caches as its own last step would have.
    """

    def measure(steps: int) -> Window:
        if prepare is not None:
            prepare()
        if warm:
            step()
        return stopwatch(step, steps, wait)

    return Case(name, measure)


def interleave(
    cases: Sequence[Case],
    rounds: int,
    steps: int,
    finished: Callable[[int], object] = lambda done: None,
    warm_rounds: int = 1,
) -> Mapping[str, Samples]:
    """Every case once per round, always in the same order.

    Args:
        steps: of one window.
        finished: called with the number of windows so far, unrecorded ones too.
        warm_rounds: unrecorded rounds before the first: heaps grow, kernels are chosen.

    Raises:
        ValueError: for two cases of one name, or nothing to do.
    """
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two cases share a name: {', '.join(twice)}")
    if not cases or rounds < 1 or steps < 1:
        raise ValueError(f"{len(cases)} cases, {rounds} rounds of {steps} steps: nothing to time")
    found = {name: Samples() for name in names}
    done = 0
    for number in range(warm_rounds + rounds):
        gc.collect()
        for case in cases:
            window = case.measure(steps)
            if number >= warm_rounds:
                found[case.name].windows.append(window)
            done += 1
            finished(done)
    return found


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
