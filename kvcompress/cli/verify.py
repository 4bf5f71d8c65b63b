"""`kvcompress verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, console, emit


def command(
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    device: Annotated[str, typer.Option(help="Device or device map for the forward.")] = "cpu",
    json_: JsonOption = False,
) -> None:
    """Check every file of a bundle, then run it: plain and compressed logits must agree.

    Example: `kvcompress verify bundle`
    """
    from kvcompress.bundle.verify import verify

    report = verify(bundle, device_map=device)
    emit(report, json_)
    console().print(f"{bundle}: sound, {report.files} files")
