"""`kvcompress demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, console, emit, human_bytes
from kvcompress.cli.progress import progress


def command(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where profile, bundle and report go.")
    ] = Path("kvcompress-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the questions: a look, not a measurement.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Profile, plan, export, load and measure the model that ships with the package, offline.

    Example: `kvcompress demo --out demo`
    """
    from kvcompress.demo.run import FULL, QUICK, run
    from kvcompress.evaluate.table import comparison

    screen = console()
    result = run(out, QUICK if quick else FULL, note=screen.print, bar=progress)
    if json_:
        emit(result, json_)
        return
    example = result.example
    screen.print(
        f"the bundle, asked {example.question!r}, wrote {example.answer!r} "
        f"with a cache of {human_bytes(example.kv_bytes)}",
        markup=False,
    )
    emit(comparison(result.reports), json_)
    screen.print(
        "int8 and int4 keep every token; the last three rows spend the bytes of the 1/8 plan; the "
        "1/4 plan was exported and loaded again, the others were attached in memory"
    )
    screen.print(
        f"bundle in {result.bundle}, figures in {result.report}; next: kvcompress generate "
        f"{result.bundle} --max-new-tokens 4 -p $'Note: red fox lemon sugar.\\nAsk: red fox'",
        markup=False,
        soft_wrap=True,
    )
    screen.print(
        "a published model: python tools/real_models.py smollm2 makes one and prints where, then "
        "kvcompress profile DIRECTORY -r recipes/quarter.yaml -o runs/real",
        markup=False,
        soft_wrap=True,
    )
