"""Columns and their sides."""

from __future__ import annotations

import io

from rich.console import Console

from kvcompress.measure.tables import markdown, terminal


def test_a_terminal_table_leaves_out_what_no_row_fills():
    rows = [{"cache": "a", "KL": None, "ppl": "2"}, {"cache": "bb"}, {"cache": "c", "ppl": None}]
    screen = io.StringIO()
    Console(file=screen, width=60).print(terminal(rows, title="T", caption="C"))
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert "T" in lines[0] and "C" in lines[-1] and "KL" not in screen.getvalue()
    found = [line.split() for line in lines]
    assert ["cache", "ppl"] in found and ["a", "2"] in found
    assert ["bb"] in found and ["c", "-"] in found
    assert terminal(rows, narrow=True).row_count == 3


def test_markdown_aligns_numbers():
    rows = [["x", "1"], ["y", ""]]
    assert markdown(["n", "ms"], rows, numbers_from=1) == (
        "| n | ms |\n| --- | ---: |\n| x | 1 |\n| y |  |"
    )
    assert markdown(["n", "ms"], [], tight=True) == "| n | ms |\n|---|---|"
