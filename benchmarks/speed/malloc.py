"""Processes that are measured, under an allocator that is told how to behave.

Needs nothing that kvcompress depends on, so that rivals' environments can import it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvcompress.measure.machine import TUNED_MALLOC, VARIABLE, uses_glibc


def environment(threads: int, malloc: str = "tuned") -> dict[str, str]:
    """Variables for a process that is to be measured.

    Args:
        malloc: ``tuned`` or ``default``.
    """
    own = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if malloc == "tuned" and uses_glibc():
        own[VARIABLE] = TUNED_MALLOC
    own["OMP_NUM_THREADS"] = str(threads)
    return own


def restart_tuned(threads: int, arguments: Sequence[str] | None = None) -> None:
    """Start this script again with glibc's thresholds raised, unless they are.

    glibc reads its tunables when a process starts, so this is the only way to set them by name.
    """
    wanted = environment(threads)
    if all(os.environ.get(name) == wanted.get(name) for name in (VARIABLE, "OMP_NUM_THREADS")):
        return
    command = [sys.executable, *(sys.argv if arguments is None else arguments)]
    os.execve(sys.executable, command, wanted)
