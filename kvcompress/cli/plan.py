"""`kvcompress plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, console, emit
from kvcompress.cli.progress import progress


def command(
    profile: Annotated[Path, typer.Argument(help="Directory that `kvcompress profile` wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Plan file to write.")],
    recipe: Annotated[
        Path | None,
        typer.Option("-r", "--recipe", help="Recipe YAML to solve in place of the profile's."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Weights, KV cache and prefill of one layer together, like 8GiB."),
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of the bf16 KV bytes to keep, like 0.25.")
    ] = None,
    recovery: Annotated[
        float | None, typer.Option(help="FastGen: least share of attention to keep, like 0.95.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in each row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    for_: Annotated[
        str | None,
        typer.Option("--for", help="Also the closest setting of vllm, llama.cpp or transformers."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Solve PROFILE for another target or another recipe, without measuring again.

    What a recipe needs and PROFILE did not measure is named, and no plan is written. Examples:

        kvcompress plan runs/fastgen --keep-ratio 0.25 --context 1024 -o plan.json

        kvcompress plan runs/fastgen -r recipes/eighth.yaml -o plan.json

        kvcompress plan runs/fastgen --keep-ratio 0.25 --for vllm -o plan.json
    """
    from kvcompress.atomic import write_file
    from kvcompress.profile import report
    from kvcompress.profile.engines import closest
    from kvcompress.profile.options import policy_from_options
    from kvcompress.profile.solve import solve_recipe
    from kvcompress.profile.store import Profile
    from kvcompress.recipe import Recipe

    measured = Profile.load(profile)
    wanted = measured.recipe if recipe is None else Recipe.load(recipe)
    policy = policy_from_options(
        wanted.policy,
        memory=memory,
        keep_ratio=keep_ratio,
        recovery=recovery,
        context=context,
        batch=batch,
    )
    with progress("planning"):
        plan = solve_recipe(measured, wanted, policy)
    size = report.planned_size(measured.recipe, policy)
    near = None if for_ is None else closest(measured, plan, for_, *size)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, plan.to_json())
    console().print(f"plan written to {out}")
    if json_:
        facts = report.summary(plan, *size)
        emit(facts if near is None else facts | {"closest": near.facts()}, json_)
        return
    emit(report.table(plan, *size), json_)
    if near is not None:
        console().print(near.said(measured.loss_unit), highlight=False, markup=False)
