"""`kvcompress probe`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcompress.cli.common import DeviceOption, JsonOption, chosen, console, emit
from kvcompress.cli.progress import progress
from kvcompress.cli.words import table_of


def command(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a causal model.")],
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Read config.json alone and make weights up."),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="With --random-weights: only the first so many layers."),
    ] = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Say what the compressed cache can do for MODEL, by running it: supported, limits, refused.

    Exits with 2 where the model is refused. Example:

        kvcompress probe kvcompress/demo/model
    """
    from kvcompress.profile.source import load_model, random_model
    from kvcompress.runtime.check.probe import as_rows, probe

    if layers is not None and not random_weights:
        raise typer.BadParameter("--layers needs --random-weights: a real model has all of them")
    with progress(f"probing {model}"):
        if random_weights:
            loaded = random_model(model, layers).to(chosen(device))
        else:
            loaded = load_model(model, device)
        found = probe(loaded, model)
    if json_:
        emit(found, json_)
    else:
        console().print(
            f"{found.model}: {found.model_type}, "
            + (
                f"{found.layers} layers, {found.kv_heads} KV heads of {found.head_dim} channels, "
                f"{found.max_position} positions"
                if found.supported
                else "refused"
            )
        )
        emit(table_of(as_rows(found), "capability", "", "error", "note"), json_)
        console().print(
            "yes: tried and right; error: distance of logits to those of the full cache, as a "
            "share of their size"
        )
    if not found.supported:
        raise typer.Exit(2)
