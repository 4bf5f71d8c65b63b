"""`kvcompress inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, emit
from kvcompress.cli.words import inspected


def command(
    path: Annotated[Path, typer.Argument(help="Bundle, profile directory or plan.json.")],
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per sequence; the plan's longest if not given."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    json_: JsonOption = False,
) -> None:
    """Show what each KV head keeps, in how many bits, and what that costs in bytes.

    Example: `kvcompress inspect bundle --context 8192 --batch 4`
    """
    from kvcompress.bundle.inspect import inspect
    from kvcompress.profile.report import glossary

    found = inspect(path, context, batch)
    if json_:
        emit(found, json_)
        return
    words = [f"{row.keeps} {row.storage}" for row in found.heads if row.head is not None]
    emit(inspected(found, [glossary(words, found.sink_tokens, found.recent_tokens)]), json_)
