"""How far long work is, on stderr: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvcompress.cli.common import console

EVERY_SECONDS: Final = 25.0  # a line is late where Python waits for a library: 30 are promised

THREAD: Final = "kvcompress progress"


class Step(Protocol):
    """Told what is done; `note` prints a remark and says what goes on from here."""

    def __call__(self, done: int, /) -> None: ...

    def note(self, text: str, /) -> None: ...


@contextmanager
def progress(label: str, total: int = 1) -> Iterator[Step]:
    """Show `label` and how many of `total` steps are done, until the block ends.

    Args:
        label: what is done, like ``profiling MODEL``.
        total: 1 for work whose end cannot be told: only the time is shown.
    """
    screen = console()
    if screen.is_terminal:
        with _bar(screen, label, total) as step:
            yield step
        return
    lines = Lines(label, total, screen.print)
    stop = threading.Event()
    teller = threading.Thread(target=lines.tell, args=(stop.wait,), name=THREAD, daemon=True)
    teller.start()
    try:
        yield lines
    finally:
        stop.set()
        teller.join()


class Lines:
    """Lines of text about work that goes on.

    Args:
        say: prints one line.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        label: str,
        total: int,
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.say, self.clock = label, total, say, clock
        self.done, self.doing, self.begun = 0, "", clock()
        self.moved = self.begun

    def __call__(self, done: int, /) -> None:
        if done > self.done:
            self.done, self.moved = done, self.clock()

    def note(self, text: str, /) -> None:
        self.say(text)
        self.doing = text

    def tell(self, wait: Callable[[float], bool]) -> None:
        """Print a line every `EVERY_SECONDS` until `wait`, which waits so long, says to stop."""
        while not wait(EVERY_SECONDS):
            self.say(self.line())

    def line(self) -> str:
        """What goes on, how far it is, how long it took and about how long it will take."""
        parts = []
        if self.total > 1:
            parts = [f"{self.done} of {self.total} ({100 * self.done // self.total} %)"]
        parts.append(f"{words(self.clock() - self.begun)} so far")
        left = self._left_seconds() if 0 < self.done < self.total else 0.0
        if left > 0:
            parts.append(f"about {words(left)} left")
        doing = f"{self.label}: {self.doing}" if self.doing else self.label
        return f"{doing}: {', '.join(parts)}"

    def _left_seconds(self) -> float:
        """At the pace of the steps so far, less the time since the last of them."""
        pace = (self.moved - self.begun) / self.done
        return max(0.0, pace * (self.total - self.done) - (self.clock() - self.moved))


def words(seconds: float) -> str:
    """``95`` as ``1 min 35 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _bar(screen: Console, label: str, total: int) -> Iterator[Step]:
    columns: tuple[ProgressColumn, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
    )
    if total > 1:
        columns += (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    else:
        columns += (TimeElapsedColumn(),)
    with Progress(*columns, console=screen, transient=total <= 1) as bar:
        yield _BarStep(bar, label, total)


class _BarStep:
    def __init__(self, bar: Progress, label: str, total: int) -> None:
        self.bar, self.label = bar, label
        self.task = bar.add_task(label, total=total if total > 1 else None)

    def __call__(self, done: int, /) -> None:
        self.bar.update(self.task, completed=done)

    def note(self, text: str, /) -> None:
        self.bar.console.print(text)
        self.bar.update(self.task, description=f"{self.label}: {text}")
