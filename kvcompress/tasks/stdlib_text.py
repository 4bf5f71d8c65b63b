"""Real English and real code that every Python carries, read when asked for.

Prose is the language reference in `pydoc_data.topics`; code is the standard library's top-level
modules. The name of a topic or a module decides which split has it, so that what a profile is
calibrated on and what a result is measured on have no paragraph in common.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from kvcompress.errors import KVCompressError

Split = Literal["calibration", "evaluation"]
_ONE_IN: Final = 4  # topics and modules that are left for evaluation


def split_of(name: str) -> Split:
    """Which split a topic or a module belongs to; the same on every machine."""
    held_out = hashlib.sha256(name.encode()).digest()[0] % _ONE_IN == 0
    return "evaluation" if held_out else "calibration"


def prose(split: Split) -> str:
    """The language reference's topics of `split`, by name.

    Raises:
        KVCompressError: if this Python came without its `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise KVCompressError(
            "this Python has no pydoc_data: install its standard library whole, or give a text"
        ) from None
    return _joined(topics, split)


def code(split: Split) -> str:
    """The source of the standard library's public top-level modules of `split`, by name.

    Raises:
        KVCompressError: if this Python came without its sources.
    """
    sources = dict(_sources(Path(sysconfig.get_paths()["stdlib"])))
    if not sources:
        raise KVCompressError(
            "this Python has no sources of its standard library: install it whole, or give a text"
        )
    return _joined(sources, split)


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("[a-z]*.py")):
        if path.stem in sys.stdlib_module_names:
            with tokenize.open(path) as file:
                yield path.stem, file.read()


def _joined(texts: Mapping[str, str], split: Split) -> str:
    """Each paragraph once; one that both splits hold is evaluation's."""
    seen: set[str] = set()
    if split == "calibration":
        held_out = _of(texts, "evaluation")
        seen = {paragraph.strip() for text in held_out for paragraph in _paragraphs(text)}
    kept = []
    for text in _of(texts, split):
        for paragraph in _paragraphs(text):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def _of(texts: Mapping[str, str], split: Split) -> Iterable[str]:
    return (texts[name] for name in sorted(texts) if split_of(name) == split)


def _paragraphs(text: str) -> list[str]:
    """What stands between empty lines, with the space that indents it."""
    return [part.strip("\n").rstrip() for part in text.split("\n\n") if part.strip()]
