"""`kvcompress bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.common import DeviceOption, JsonOption, console, emit
from kvcompress.cli.progress import progress

if TYPE_CHECKING:
    from kvcompress.evaluate.compare import Row


def command(
    model: Annotated[str, typer.Argument(help="Bundle, model directory or a name on the Hub.")],
    plan: Annotated[
        Path | None,
        typer.Option(help="plan.json, profile or bundle whose plan to time on the model."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 1,
    peers: Annotated[
        str,
        typer.Option(
            help="Of dynamic, static, quantized-fp8, quantized-quanto and quantized-hqq, with "
            "commas between; empty for none."
        ),
    ] = "dynamic,static",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every cache has its turn.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that it decodes in a turn.")] = 4,
    threads: Annotated[
        int, typer.Option(min=0, help="Of the processor; 0 is what torch chooses.")
    ] = 0,
    fill: Annotated[
        str,
        typer.Option(
            help="synthetic puts random keys into the caches; prompt has the model read random "
            "tokens, which takes as long as it takes."
        ),
    ] = "synthetic",
    malloc: Annotated[
        str,
        typer.Option(
            help="tuned keeps freed memory, which DynamicCache needs to be fast; default does not."
        ),
    ] = "tuned",
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Time a decode step beside transformers' caches and beside the floor that memory sets.

    A model without a plan is timed with every token in int8. Example:

        kvcompress bench bundle --context 4096 --batch 1
    """
    from kvcompress.bench.run import bench, fill_of
    from kvcompress.bench.table import result_table

    filled, words = fill_of(fill), _malloc(malloc)
    with progress(f"loading {model}"):
        loaded, own = _load(model, plan, device)
    import torch

    from kvcompress.bench.cell import Rounds
    from kvcompress.bench.entries import Size

    size = Size(context, batch, 0, threads or torch.get_num_threads(), filled)
    names = [word.strip() for word in peers.split(",") if word.strip()]
    often = Rounds(rounds, steps)
    screen = console()
    total = often.windows(len(names) + 1 + len(own) + 2)
    with progress("timing", total) as finished:
        result = bench(
            loaded,
            own,
            names,
            size,
            often,
            model_name=_short(model),
            malloc=words,
            command=shlex.join(["kvcompress", *sys.argv[1:]]),
            note=screen.print if screen.is_terminal else lambda text: None,
            finished=finished,
        )
    emit(result if json_ else result_table(result), json_)


def _malloc(choice: str) -> str:
    """Set the allocator up, and say how."""
    from kvcompress.measure.machine import keep_freed_memory, malloc_words

    if choice == "default":
        return malloc_words()
    if choice != "tuned":
        raise ValueError(f"--malloc {choice}: choose tuned or default")
    return "glibc, freed memory is kept" if keep_freed_memory() else malloc_words()


def _load(source: str, plan: Path | None, device: str) -> tuple[Any, list[Row]]:
    """The model, and the plans to time on it: a bundle brings its own."""
    from kvcompress.bundle.manifest import is_bundle
    from kvcompress.bundle.read import load_weights, open_bundle
    from kvcompress.evaluate.compare import Row, plan_row
    from kvcompress.evaluate.serving import model_shape
    from kvcompress.plan import HeadPlan, uniform
    from kvcompress.profile.source import load_model

    given = [] if plan is None else [plan_row(plan)]
    if is_bundle(source):
        bundle = open_bundle(source)
        model = load_weights(bundle, device)
        return model, [Row(Path(source).name, bundle.plan, bundle.params), *given]
    model = load_model(source, device)
    if not given:
        every = uniform(model_shape(model), HeadPlan(full=True), target="int8, every token")
        given = [Row(every.target, every, None)]
    return model, given


def _short(model: str) -> str:
    """The name without the folders of an absolute path, which say where somebody works."""
    return Path(model).name if Path(model).is_absolute() else model
