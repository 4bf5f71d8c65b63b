"""`kvcompress export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, MapOption, emit
from kvcompress.cli.progress import progress
from kvcompress.cli.words import exported
from kvcompress.plan import Plan, WeightScheme


def command(
    profile: Annotated[Path, typer.Argument(help="Directory made by kvcompress profile.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the bundle goes.")],
    plan: Annotated[
        Path | None, typer.Option(help="plan.json to ship in place of the profile's.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("-r", "--recipe", help="Recipe to solve in place of the profile's."),
    ] = None,
    weights: Annotated[
        WeightScheme | None, typer.Option(help="Weight format in place of the recipe's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the profiled model is now, if it was moved.")
    ] = None,
    device: MapOption = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle that is there.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Write one directory with weights, plan and key constants, checked in a fresh process.

    With `--recipe` the plan is solved from PROFILE, where it measured what that recipe needs.
    Example: `kvcompress export profile -o bundle --weights nf4`
    """
    from kvcompress.bundle.write import export
    from kvcompress.recipe import Recipe

    if plan is not None and recipe is not None:
        raise typer.BadParameter("--plan ships a plan that is there, --recipe solves one: give one")
    with progress("exporting") as step:
        report = export(
            model,
            profile,
            out,
            plan=None if plan is None else Plan.load(plan),
            recipe=None if recipe is None else Recipe.load(recipe),
            weights=weights,
            overwrite=overwrite,
            device_map=device,
            note=step.note,
        )
    emit(report if json_ else exported(report), json_)
