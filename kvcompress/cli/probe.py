"""`kvcompress probe`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, console, emit


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
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA if there is one.")] = "auto",
    json_: JsonOption = False,
) -> None:
    """Say what the compressed cache can do for MODEL, by running it: supported, limits, refused.

    Exits with 2 where the model is refused. Example:

        kvcompress probe kvcompress/demo/model
    """
    from kvcompress.profile.source import load_model, random_model
    from kvcompress.runtime.probe import as_rows, probe

    if layers is not None and not random_weights:
        raise typer.BadParameter("--layers needs --random-weights: a real model has all of them")
    loaded = random_model(model, layers) if random_weights else load_model(model, device)
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
        emit(as_rows(found), json_)
    if not found.supported:
        raise typer.Exit(2)
