"""A case in a process of its own, which takes its turn when it is told to.

The driver writes ``{"steps": n}`` to the worker's standard input and waits for the window; between
its turns the worker blocks on that pipe. Needs nothing but the standard library, so that any
environment can import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

Record = dict[str, Any]


# ---- in the worker
class Replies:
    """The worker's standard output, kept for answers; what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def serve(replies: Replies, facts: Record, window: Callable[[int], Record]) -> None:
    """Say what is ready, then time windows until the driver closes the pipe."""
    replies.send({"ready": facts})
    for line in sys.stdin:
        replies.send(window(int(json.loads(line)["steps"])))


# ---- in the driver
class WorkerError(RuntimeError):
    """A worker ended, or said something else than an answer."""


class Worker:
    """A running worker.

    Args:
        command: the worker's program and arguments.
        environment: all of its variables.

    Attributes:
        facts: what it said of itself when it was ready.

    Raises:
        WorkerError: with the end of its log, if it ends before it is ready.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(environment),
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"{command[0]}: {error.strerror}") from None
        self.facts: Record = self._answer()["ready"]

    def window(self, steps: int) -> Record:
        """What so many steps took: ``wall_s``, ``cpu_s``, ``faults``, ``steps``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it; whatever it still does is of no use."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _answer(self) -> Record:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        answer: Record = json.loads(line)
        return answer

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        self._log.seek(0)
        lines = [x.strip() for x in self._log.read().splitlines() if x.strip()]
        self.close()
        raise WorkerError(f"ended with {code}: {lines[-1] if lines else 'no message'}")
