"""Bytes per second that this machine reads and copies, measured beside what is compared to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

from kvcompress.measure.timing import Case, case_of

BUFFER_BYTES: Final = 2**30  # far beyond any cache of a processor
_TRIES: Final = 3
_UNTIL_IDLE_S: Final = 0.05


class Buffers:
    """Memory to read and to copy.

    Attributes:
        read_bytes, copied_bytes: of one pass; a copy reads and writes.
    """

    def __init__(self, size_bytes: int = BUFFER_BYTES, device: torch.device | str = "cpu") -> None:
        elements = size_bytes // 8
        self._source = torch.ones(2, elements, device=device)
        self._target = torch.empty(elements, device=device)
        self._sum_is_faster: bool | None = None
        self.read_bytes = 2 * elements * 4
        self.copied_bytes = 2 * elements * 4

    def read(self) -> None:
        """Every byte of the source once, by the faster of two ways to sum."""
        if self._sum_is_faster is None:
            self._sum_is_faster = _best_s(self._sum) <= _best_s(self._dot)
        (self._sum if self._sum_is_faster else self._dot)()

    def copy(self) -> None:
        self._target.copy_(self._source[0])

    def _sum(self) -> None:
        self._source.sum()

    def _dot(self) -> None:
        torch.dot(self._source[0], self._source[1])

    def cases(self, threads: int, wait: Callable[[], object] | None = None) -> tuple[Case, Case]:
        """Reading and copying with so many threads; other counts need `Buffers` of their own."""

        def prepare() -> None:
            use_threads(threads)

        return (
            case_of(f"read, {threads} threads", self.read, prepare=prepare, wait=wait),
            case_of(f"copy, {threads} threads", self.copy, prepare=prepare, wait=wait),
        )


def use_threads(threads: int) -> None:
    """Have torch use so many threads from now on.

    OpenMP's workers spin for some milliseconds after their last work, on a core that a case with
    fewer threads should have for itself; it waits until they sleep.
    """
    before = torch.get_num_threads()
    if before == threads:
        return
    torch.set_num_threads(threads)
    if threads < before:
        time.sleep(_UNTIL_IDLE_S)


def _best_s(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
