"""Tables: on a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.table import Table

NOTHING: Final = "-"  # shown where a row has no figure


def terminal(
    rows: Sequence[Mapping[str, str | None]],
    *,
    title: str | None = None,
    caption: str | None = None,
    words: int = 1,
    narrow: bool = False,
) -> Table:
    """A table with the headings of the first of `rows`; columns that no row fills are left out.

    Args:
        rows: text by heading; None is shown as ``-``, and a heading that is missing as nothing.
        words: so many columns hold words and stand left; the others hold numbers.
        narrow: one space between columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
        pad_edge=narrow,
    )
    headings = dict.fromkeys(heading for row in rows for heading in row)
    shown = [name for name in headings if any(row.get(name) is not None for row in rows)]
    for place, name in enumerate(shown):
        table.add_column(name, justify="left" if place < words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(NOTHING if row.get(n, "") is None else row.get(n, "") for n in shown))
    return table


def markdown(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers_from: int | None = None,
    tight: bool = False,
) -> str:
    """A table.

    Args:
        numbers_from: the first of the columns that stand right; None for none.
        tight: dashes without spaces around them.
    """
    first = len(headings) if numbers_from is None else numbers_from
    marks = ["---" + ":" * (place >= first) for place in range(len(headings))]
    line = "|" + "|".join(marks) + "|" if tight else "| " + " | ".join(marks) + " |"
    written = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    return "\n".join([written[0], line, *written[1:]])
