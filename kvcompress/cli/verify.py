"""`kvcompress verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, MapOption, console, emit
from kvcompress.cli.progress import progress
from kvcompress.cli.words import verified


def command(
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    device: MapOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Check every file of a bundle, then run it: plain and compressed logits must agree.

    Exits with 0 where the bundle is sound, else with 2.

    Example: `kvcompress verify bundle`
    """
    from kvcompress.bundle.verify import verify

    with progress(f"checking {bundle}"):
        report = verify(bundle, device_map=device)
    emit(report if json_ else verified(report), json_)
    console().print(f"{bundle}: sound, {report.files} files")
