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
        typer.Option("-d", "--data", help="A .txt, .jsonl, .parquet file or a datasets name."),
    ] = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Measure each KV head of MODEL on calibration prompts, and plan what it keeps.

    Stopped with Ctrl-C, the same command goes on where it was. Example:

        kvcompress profile kvcompress/demo/model -r recipes/fastgen.yaml -o runs/fastgen
    """
    from kvcompress.profile import report
    from kvcompress.profile.run import run_and_plan
    from kvcompress.profile.source import load_source
    from kvcompress.profile.store import Profile
    from kvcompress.recipe import Recipe

    wanted = Recipe() if recipe is None else Recipe.load(recipe)
    if data is not None:
        calibration = wanted.calibration.model_copy(update={"data": data})
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
    note = Profile.load(out).loss_note
    if note:
        console().print(f"losses are measured without gradients: {note}")
    size = report.planned_size(wanted)
    emit(report.summary(plan, *size) if json_ else report.table(plan, *size), json_)
