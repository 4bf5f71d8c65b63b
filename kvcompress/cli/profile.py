"""`kvcompress profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import DeviceOption, JsonOption, console, emit
from kvcompress.cli.progress import progress


def command(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a causal model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile directory to write.")],
    recipe: Annotated[
        Path | None, typer.Option("-r", "--recipe", help="Recipe YAML; default: FastGen, int8.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "-d",
            "--data",
            help="A .txt, .jsonl, .parquet file or a datasets name, for half of the prompts.",
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=SHARE: what gives which share of the prompts; repeatable."),
    ] = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Measure each KV head of MODEL on calibration prompts, and plan what it keeps.

    Stopped with Ctrl-C, the same command goes on where it was. Example:

        kvcompress profile kvcompress/demo/model -r recipes/fastgen.yaml -o runs/fastgen
    """
    from kvcompress.profile import report
    from kvcompress.profile.calibration import asked_for
    from kvcompress.profile.run import run_and_plan
    from kvcompress.profile.source import load_source
    from kvcompress.profile.store import Profile
    from kvcompress.recipe import Recipe

    wanted = Recipe() if recipe is None else Recipe.load(recipe)
    calibration = asked_for(wanted.calibration, data, mix or ())
    wanted = wanted.model_copy(update={"calibration": calibration})
    with progress(f"loading {model}"):
        loaded, tokenizer = load_source(model, device)
    with progress(f"profiling {model}", total=100) as step:
        plan = run_and_plan(
            loaded,
            tokenizer,
            wanted,
            out,
            progress=lambda done, total: step(round(100 * done / total)),
            name=model,
        )
    console().print(f"profile and plan written to {out}")
    profile = Profile.load(out)
    if profile.loss_note:
        console().print(f"losses are measured without gradients: {profile.loss_note}")
    if profile.calibration_note:
        console().print(f"note: {profile.calibration_note}")
    size = report.planned_size(wanted)
    emit(report.summary(plan, *size) if json_ else report.table(plan, *size), json_)
