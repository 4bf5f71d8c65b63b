"""`kvcompress profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvcompress.cli.common import DeviceOption, DtypeOption, JsonOption, console, emit
from kvcompress.cli.progress import progress
from kvcompress.recipe import PARTS, Recipe, parse_bytes

QUICK_PROMPTS: Final = 4


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
    dtype: DtypeOption = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure this too, for a later plan: {', '.join(PARTS)}; repeatable."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Only {QUICK_PROMPTS} prompts: a first plan.")
    ] = False,
    memory_limit: Annotated[
        str | None, typer.Option(help="Of this process, weights included, like 8GiB.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure each KV head of MODEL on calibration prompts, and plan what it keeps.

    Only what the recipe's policy reads is measured; `--also` adds more, to a finished profile too.
    Stopped with Ctrl-C, the same command goes on where it was. Examples:

        kvcompress profile kvcompress/demo/model -r recipes/quarter.yaml -o runs/quarter

        kvcompress profile kvcompress/demo/model -o runs/quarter --also recovery
    """
    from kvcompress.profile import report
    from kvcompress.profile.calibration import asked_for
    from kvcompress.profile.code_costs import code_costs
    from kvcompress.profile.run import run_and_plan
    from kvcompress.profile.source import load_source
    from kvcompress.profile.store import PROFILE_FILE, Profile

    more = [part for part in PARTS if part in (also or ())]
    unknown = {*(also or ())} - {*more}
    if unknown:
        raise typer.BadParameter(f"--also {min(unknown)}: give one of {', '.join(PARTS)}")
    try:
        limit = None if memory_limit is None else parse_bytes(memory_limit)
    except ValueError as error:
        raise typer.BadParameter(f"--memory-limit: {error}") from None
    if recipe is None and (out / PROFILE_FILE).is_file():
        wanted = Profile.load(out).recipe
    else:
        wanted = Recipe() if recipe is None else Recipe.load(recipe)
    calibration = asked_for(wanted.calibration, data, mix or ())
    wanted = wanted.model_copy(update={"calibration": calibration})
    if quick:
        wanted = wanted.with_prompts(QUICK_PROMPTS)
    with progress(f"loading {model}"):
        loaded, tokenizer = load_source(model, device, dtype)
    with progress(f"profiling {model}", total=100) as step:
        plan = run_and_plan(
            loaded,
            tokenizer,
            wanted,
            out,
            progress=lambda done, total: step(round(100 * done / total)),
            name=model,
            also=more,
            memory_limit_bytes=limit,
        )
    console().print(f"profile and plan written to {out}")
    profile = Profile.load(out)
    if profile.loss_note:
        console().print(f"losses are measured without gradients: {profile.loss_note}")
    if profile.calibration_note:
        console().print(f"note: {profile.calibration_note}")
    size, costs = report.planned_size(wanted), code_costs(profile)
    if json_:
        facts = report.summary(plan, *size)
        emit(facts if costs is None else facts | {"codes": costs.facts()}, json_)
        return
    if costs is not None:
        console().print(costs.table())
    emit(report.table(plan, *size), json_)
