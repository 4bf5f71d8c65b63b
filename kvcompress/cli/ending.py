"""How a command ends: what is wrong as one line on stderr, and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from kvcompress.errors import KVCompressError
from kvcompress.plan import explain

USER_ERROR: Final = 2
BUG: Final = 70
INTERRUPTED: Final = 130
NOBODY_READS: Final = 141  # as a shell reports SIGPIPE
STOPPING: Final = ("SIGTERM", "SIGHUP")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY: Final = ("DefaultCPUAllocator", "CUDA out of memory", "not enough memory")


def of_a_user(error: BaseException) -> str | None:
    """What to tell about an error that a user's input or machine causes; None for a bug of ours."""
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, ValidationError):
        return f"{error.title}: {explain(error)}"
    if isinstance(error, KVCompressError | ValueError):
        return str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("kvcompress"):
        return f"this needs the package {error.name}, which is not installed: pip install it"
    full = isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)
    if full or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; give a smaller batch or context, or free some"
    if type(error).__name__ == "SafetensorError":  # raised by a library that need not be imported
        return f"a weights file cannot be read or written ({error})"
    return None


def of_ours(error: BaseException, name: str) -> str:
    """What to tell about a bug, with the place in our code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}kvcompress{os.sep}" in frame.filename]
    place = f" at {Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    text = " ".join(str(error).split())[:200]
    return (
        f"this is a bug in kvcompress ({type(error).__name__}: {text}{place}): run it again as "
        f"kvcompress --traceback {name} … and report what it prints"
    )


def _of_the_system(error: OSError) -> str:
    if not error.strerror:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    todo = "; free some space and run the same command again" if error.errno in _FULL else ""
    return f"{where}{error.strerror}{todo}"


def fail(message: str, code: int = USER_ERROR) -> NoReturn:
    """One line, whatever the message holds: a file's name or text may hold anything."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    say(f"error: {shown}")
    sys.exit(code)


def say(line: str) -> None:
    """On stderr, if anybody listens."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _to_nowhere(2)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, quietly ended where the reader of a pipe has gone."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            _to_nowhere(1)
            raise SystemExit(NOBODY_READS) from None

    return run


def flush() -> None:
    """Write what is left for stdout while an error can still be told.

    Raises:
        SystemExit: where nobody reads, or it cannot be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(1)
        sys.exit(NOBODY_READS)
    except OSError as error:
        _to_nowhere(1)
        fail(f"standard output: {_of_the_system(error)}")


def check_streams() -> None:
    """Refuse a closed stdout, whose number the next file to be opened would take.

    A closed stderr only loses remarks; text that the terminal cannot show is escaped.
    """
    for number in (0, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        fail("standard output is closed; send it to a file, or to /dev/null")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def check_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are no text: a tokenizer and a recipe's or profile's JSON take none."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raw = os.fsencode(argument)
            fail(f"argument {raw!r} is not UTF-8; write it so, or rename the file that it names")


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up.

    Yields:
        The numbers of the signals that came.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread, which alone is told of signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_nowhere(number: int) -> None:
    """What is still buffered for a broken stream goes nowhere, without a second error at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except OSError:
        pass
