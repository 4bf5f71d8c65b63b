"""`kvcompress doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, emit


def command(
    path: Annotated[
        Path | None, typer.Argument(help="Bundle or plan.json whose layers to look at.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Say which kernels this installation decodes with, and why not faster ones.

    Example: `kvcompress doctor bundle`
    """
    from kvcompress.runtime.doctor import diagnose

    emit(diagnose(path), json_)
