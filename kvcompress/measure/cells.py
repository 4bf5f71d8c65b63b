"""Finished measurements on disk, by name: a run that was stopped goes on, a repeated one is quick.

`Folder` holds a file for each cell, so that several processes may write; `Book` is one file with
the conditions under which its cells were measured.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, final

from pydantic import ValidationError

from kvcompress.atomic import write_file
from kvcompress.plan import StrictModel
from kvcompress.strict import JSON_LIMIT_BYTES, NotStrictError, load_json, read_text

T = TypeVar("T")
Kept = TypeVar("Kept", bound=StrictModel)
Note = Callable[[str], object]
Record = dict[str, Any]  # whatever a benchmark writes as a JSON object
_SHOWN: Final = "{}: {:.0f} s"


class AbstractCells(ABC, Generic[T]):
    """Cells by name."""

    note: Note = staticmethod(lambda text: None)

    @abstractmethod
    def find(self, name: str) -> T | None:
        """The cell, None where it has to be measured."""

    @abstractmethod
    def keep(self, name: str, cell: T) -> None:
        """Write it at once."""

    def get(self, name: str, make: Callable[[], T]) -> T:
        """The cell, measured by `make` and written now if it is not there."""
        found = self.find(name)
        if found is None:
            begin = time.perf_counter()
            found = make()
            self.keep(name, found)
            self.note(_SHOWN.format(name, time.perf_counter() - begin))
        return found


@final
class Folder(AbstractCells[Kept]):
    """``NAME.json`` for each cell under `folder`; one that is damaged is measured again.

    Args:
        accept: whether a cell that was read may still stand for a measurement of today.
    """

    def __init__(
        self, folder: Path, kind: type[Kept], accept: Callable[[Kept], bool] = lambda cell: True
    ) -> None:
        self.folder, self._kind, self._accept = folder, kind, accept

    def find(self, name: str) -> Kept | None:
        try:
            text = read_text(self.folder / f"{name}.json", JSON_LIMIT_BYTES)
            load_json(text)
            found = self._kind.model_validate_json(text)
        except (NotStrictError, ValidationError):
            return None
        return found if self._accept(found) else None

    def keep(self, name: str, cell: Kept) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / f"{name}.json", cell.model_dump_json() + "\n")


@final
class Book(AbstractCells[Record]):
    """A JSON file of ``conditions`` and ``cells``, begun anew where the conditions are others."""

    def __init__(self, path: Path, stated: Record, note: Note = print) -> None:
        self.path, self.note = path, note
        self.content: Record = {"conditions": stated, "cells": {}}
        if path.is_file():
            before = load_json(read_text(path, JSON_LIMIT_BYTES))
            if isinstance(before, dict) and before.get("conditions") == stated:
                self.content = before

    @property
    def cells(self) -> dict[str, Record]:
        found: dict[str, Record] = self.content["cells"]
        return found

    def find(self, name: str) -> Record | None:
        return self.cells.get(name)

    def keep(self, name: str, cell: Record) -> None:
        self.cells[name] = cell
        write_json(self.path, self.content)


def write_json(path: Path, content: object) -> None:
    """Indented, with a list of numbers on one line."""
    parts = json.dumps(content, indent=1).split("[")
    for number, part in enumerate(parts[1:], start=1):
        inside, closed, rest = part.partition("]")
        if closed and "{" not in inside:
            parts[number] = " ".join(inside.split()) + closed + rest
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "[".join(parts) + "\n")
