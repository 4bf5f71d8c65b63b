"""`kvcompress generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, MapOption, console, emit, refuse_unread
from kvcompress.cli.progress import progress
from kvcompress.cli.words import completed


def command(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to answer, or go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, more samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens of the written prompt that are never evicted, like 0:128; repeatable."
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the text; no chat template writes it.")
    ] = False,
    device: MapOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Answer one prompt with the compressed cache, token by token on stdout.

    Where the tokenizer has a chat template, it writes the prompt as the first turn of a user.

    Example: `kvcompress generate bundle -p "Once upon a time" --max-new-tokens 50`
    """
    from kvcompress.bundle.load import load
    from kvcompress.runtime.complete import complete

    if temperature == 0:
        refuse_unread(context, "without --temperature above 0", "seed")
    spans = [_span(text) for text in protect or []]
    with progress(f"loading {bundle}"):
        model, tokenizer = load(bundle, device_map=device)
    result = complete(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stream=not json_,
        protect=spans,
        raw=raw,
    )
    if json_:
        emit(result, json_)
    console().print(completed(result))


def _span(text: str) -> range:
    """``0:128`` as a range."""
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit()):
        raise typer.BadParameter(f"--protect {text!r}: write FIRST:STOP, like 0:128")
    return range(int(first), int(stop))
