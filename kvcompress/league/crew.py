"""Tasks in this process or in several; a task that fails is told and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Any, Final, Self, final

from kvcompress.errors import KVCompressError, PlanError
from kvcompress.league.result import LeagueError
from kvcompress.league.work import Setup, Task, Worker

_WORKER: list[Worker] = []  # this process's own, made when a pool starts it
_SHOWN: Final = 300  # characters of an error message that are kept


@dataclass(frozen=True, slots=True)
class Done:
    """A finished task; `error` is empty where it succeeded.

    Attributes:
        refused: the error says that there is no such plan, which is an answer and not a failure.
    """

    number: int
    value: Any = None
    error: str = ""
    refused: bool = False


@final
class Crew:
    """`jobs` processes with a model each, or this process where `jobs` is 1; one thread each."""

    def __init__(self, setup: Setup, jobs: int) -> None:
        self.setup, self.jobs = setup, jobs
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Event | None = None

    def __enter__(self) -> Self:
        if self.jobs > 1:
            spawning = multiprocessing.get_context("spawn")
            self._stop = spawning.Event()
            self._pool = ProcessPoolExecutor(
                self.jobs,
                mp_context=spawning,
                initializer=_start,
                initargs=(self.setup, self._stop),
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        _WORKER.clear()
        if self._stop is not None and error is not None:
            self._stop.set()  # nobody waits for what a stopped league is in the middle of
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Each task as it is done, begun in their order.

        Raises:
            LeagueError: if a process ends in the middle of a task.
        """
        if self._pool is None:
            with _one_thread():
                if not _WORKER and tasks:
                    _WORKER.append(Worker(self.setup))
                for number, task in enumerate(tasks):
                    yield _attempt(number, task)
            return
        waiting: list[Future[Done]] = [
            self._pool.submit(_attempt, number, task) for number, task in enumerate(tasks)
        ]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise LeagueError(
                "a process of the league was ended from outside, perhaps for want of memory: run "
                "the same command again with fewer --jobs; finished cells are kept"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _start(setup: Setup, stop: Event) -> None:
    import torch

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: finished cells are on disk
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_end_when_stopped, args=(stop,), daemon=True).start()
    torch.set_num_threads(1)
    _WORKER.append(Worker(setup))


def _end_with_parent() -> None:
    """A parent that is killed tells its processes nothing; they would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_when_stopped(stop: Event) -> None:
    stop.wait()
    os._exit(130)


def _attempt(number: int, task: Task) -> Done:
    try:
        return Done(number, _WORKER[0].do(task))
    except PlanError as error:
        return Done(number, error=_line(error), refused=True)
    except (KVCompressError, ValueError) as error:
        return Done(number, error=_line(error))
    except Exception as error:  # a bug in one method must not end the league
        return Done(number, error=f"{type(error).__name__}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a process of its own: the order of additions, and so the result, is the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
