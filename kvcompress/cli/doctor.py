"""`kvcompress doctor`, and its part for a model under the name that it had, `kvcompress probe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.common import (
    DeviceOption,
    JsonOption,
    chosen,
    console,
    emit,
    refuse_unread,
)
from kvcompress.cli.progress import progress
from kvcompress.cli.words import table_of

if TYPE_CHECKING:
    from kvcompress.runtime.check.doctor import Finding
    from kvcompress.runtime.check.probe import Capabilities

RandomOption = Annotated[
    bool, typer.Option("--random-weights", help="Read config.json alone and make weights up.")
]
LayersOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --random-weights: only the first so many layers."),
]


def command(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="A bundle or plan.json, or a model: directory, .gguf or hub name."),
    ] = None,
    random_weights: RandomOption = False,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Say what works here: which kernels decode, and why not faster ones.

    With a bundle or a plan it says how each layer decodes. With a model it runs the model and says
    what the compressed cache can do for it; where the model is refused, it exits with 2. Examples:

        kvcompress doctor bundle
        kvcompress doctor kvcompress/demo/model
    """
    from kvcompress.bundle.read import plan_at
    from kvcompress.runtime.check.doctor import diagnose

    if what is not None and not _has_a_plan(Path(what)):
        capabilities = _probed(what, random_weights, layers, device)
        found = diagnose()
        if json_:
            emit({"installation": found, "model": capabilities}, json_)
        else:
            emit(_installed(found), json_)
            _print(capabilities)
        _end(capabilities)
        return
    refuse_unread(context, "without a model", "random_weights", "layers", "device")
    found = diagnose() if what is None else diagnose(*plan_at(Path(what)))
    emit(found if json_ else _installed(found), json_)


def probe(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a causal model.")],
    random_weights: RandomOption = False,
    layers: LayersOption = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """The part of `kvcompress doctor MODEL` that is about the model, under its former name.

    Example: `kvcompress probe kvcompress/demo/model`
    """
    found = _probed(model, random_weights, layers, device)
    if json_:
        emit(found, json_)
    else:
        _print(found)
    _end(found)


def _has_a_plan(path: Path) -> bool:
    from kvcompress.bundle.manifest import is_bundle

    return (
        path.suffix == ".json"
        or is_bundle(path)
        or (path / "plan.json").is_file()
        or (path.is_file() and path.suffix.lower() != ".gguf")
    )


def _probed(model: str, random_weights: bool, layers: int | None, device: str) -> Capabilities:
    from kvcompress.profile.source import load_model, random_model
    from kvcompress.runtime.check.probe import probe

    if layers is not None and not random_weights:
        raise typer.BadParameter("--layers needs --random-weights: a real model has all of them")
    with progress(f"probing {model}"):
        if random_weights:
            loaded = random_model(model, layers).to(chosen(device))
        else:
            loaded = load_model(model, device)
        return probe(loaded, model)


def _installed(found: list[Finding]) -> object:
    rows = [{"part": f.part, "found": f.found, "why": f.why} for f in found]
    return table_of(rows, "part", "found", "why not more")


def _print(found: Capabilities) -> None:
    from kvcompress.runtime.check.probe import as_rows

    console().print(
        f"{found.model}: {found.model_type}, "
        + (
            f"{found.layers} layers, {found.kv_heads} KV heads of {found.head_dim} channels, "
            f"{found.max_position} positions"
            if found.supported
            else "refused"
        )
    )
    emit(table_of(as_rows(found), "capability", "", "error", "note"), False)
    console().print(
        "yes: tried and right; error: distance of logits to those of the full cache, as a "
        "share of their size"
    )


def _end(found: Capabilities) -> None:
    if not found.supported:
        raise typer.Exit(2)
