"""Real text that every Python carries, read from the interpreter that runs.

Neither is part of this package. What they hold is the same for one version of Python.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Final

from kvcompress.errors import CalibrationWarning
from kvcompress.tasks.documents import HELD_OUT, read_text

# modules of one file; what lies in packages of the standard library is left to evaluation
MODULES: Final[tuple[str, ...]] = tuple(
    """
    argparse ast calendar configparser contextlib copy csv dataclasses difflib doctest fractions
    ftplib functools gettext glob graphlib gzip heapq imaplib inspect ipaddress locale mailbox
    mimetypes optparse plistlib poplib pprint queue random sched selectors shelve shutil smtplib
    statistics string subprocess tarfile tempfile textwrap threading timeit tokenize traceback
    typing uuid warnings weakref
    """.split()
)
_TELLING: Final = 30  # characters from which on a line is known by its text


@lru_cache(1)
def prose() -> str:
    """The language reference that Python ships, without the topics that evaluation reads.

    Where a distribution leaves it out, an excerpt of it that we ship, with a warning.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        _warn("pydoc_data, the documentation of Python, is missing from this installation")
        return calibration_text()
    held_out = _lines(read_text(HELD_OUT))
    return "\n".join(topics[name] for name in sorted(topics) if not held_out & _lines(topics[name]))


@lru_cache(1)
def code() -> str:
    """The sources of `MODULES`, or with a warning `prose` where none of them can be read."""
    sources = [text for text in map(_source, MODULES) if text]
    if not sources:
        _warn("the sources of Python's standard library are missing from this installation")
        return prose()
    return "\n\n".join(sources)


def calibration_text() -> str:
    """Ordinary text that shares no line with the demo model's held-out text."""
    text = files("kvcompress.profile").joinpath("calibration_text.txt")
    return text.read_text(encoding="utf-8")


def _source(module: str) -> str:
    """Its text; empty where this Python lacks it, or has it without its source."""
    spec = find_spec(module)
    read = getattr(getattr(spec, "loader", None), "get_source", None)
    return (read(module) or "") if read is not None else ""


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > _TELLING}


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}: built-in calibration takes other text in its place; install it, or calibrate on "
        "text of your own",
        CalibrationWarning,
        stacklevel=4,
    )
