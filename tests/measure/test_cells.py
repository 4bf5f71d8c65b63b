"""A cell is measured once, written at once, and measured again where it cannot be trusted."""

from __future__ import annotations

import json

import pytest

from kvcompress.measure.cells import Book, Folder, write_json
from kvcompress.plan import StrictModel


class Weight(StrictModel):
    grams: int
    scales: str = "old"


def test_a_folder_measures_what_is_missing_damaged_or_not_accepted(tmp_path):
    made = []

    def weigh() -> Weight:
        made.append(1)
        return Weight(grams=7)

    folder = Folder(tmp_path / "cells", Weight)
    assert folder.get("apple", weigh) == Weight(grams=7) == folder.get("apple", weigh)
    assert made == [1] and folder.find("pear") is None
    path = tmp_path / "cells" / "apple.json"
    for damage in ("{", '{"grams": 7, "colour": 1}', '{"grams": 7, "grams": 8}', ""):
        path.write_text(damage, encoding="utf-8")
        assert folder.find("apple") is None
    assert folder.get("apple", weigh).grams == 7 and made == [1, 1]
    strict = Folder(tmp_path / "cells", Weight, lambda cell: cell.scales == "new")
    assert strict.find("apple") is None and folder.find("apple") is not None


def test_a_book_goes_on_under_the_same_conditions_alone(tmp_path):
    path, told = tmp_path / "deep" / "book.json", []
    first = Book(path, {"threads": 1}, told.append)
    first.get("a", lambda: {"ms": 3})
    with pytest.raises(KeyboardInterrupt):
        first.get("b", _stops)
    again = Book(path, {"threads": 1}, told.append)
    assert again.cells == {"a": {"ms": 3}} and again.get("a", _stops) == {"ms": 3}
    assert Book(path, {"threads": 2}).cells == {}
    assert told == ["a: 0 s"]
    assert json.loads(path.read_text("utf-8")) == {
        "conditions": {"threads": 1},
        "cells": {"a": {"ms": 3}},
    }


def _stops():
    raise KeyboardInterrupt


def test_lists_of_numbers_are_written_on_one_line(tmp_path):
    content = {"cells": [{"ms": [1.5, 2.5, 3.5], "names": ["x, [y]"]}], "none": []}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert '"ms": [1.5, 2.5, 3.5]' in text and json.loads(text) == content
