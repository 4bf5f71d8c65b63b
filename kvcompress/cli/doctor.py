"""`kvcompress doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, emit
from kvcompress.cli.words import table_of


def command(
    path: Annotated[
        Path | None, typer.Argument(help="Bundle or plan.json whose layers to look at.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Say which kernels this installation decodes with, and why not faster ones.

    Example: `kvcompress doctor bundle`
    """
    from kvcompress.bundle.read import plan_at
    from kvcompress.runtime.check.doctor import diagnose

    found = diagnose() if path is None else diagnose(*plan_at(path))
    if json_:
        emit(found, json_)
        return
    rows = [{"part": f.part, "found": f.found, "why": f.why} for f in found]
    emit(table_of(rows, "part", "found", "why not more"), json_)
