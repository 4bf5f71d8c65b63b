"""`kvcompress generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, console, emit, human_bytes


def command(
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, more samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of the prompt that are never evicted, like 0:128; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device or device map.")] = "cpu",
    json_: JsonOption = False,
) -> None:
    """Complete one prompt with the compressed cache, token by token on stdout.

    Example: `kvcompress generate bundle -p "Once upon a time" --max-new-tokens 50`
    """
    from kvcompress.runtime.complete import complete
    from kvcompress.runtime.load import load

    spans = [_span(text) for text in protect or []]
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
    )
    if json_:
        emit(result, json_)
    held, full = human_bytes(result.kv_cache_bytes), human_bytes(result.bf16_kv_cache_bytes)
    console().print(
        f"{result.prompt_tokens} + {result.new_tokens} tokens, "
        f"KV cache {held}, in bf16 it would be {full}"
    )


def _span(text: str) -> range:
    """``0:128`` as a range."""
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit()):
        raise typer.BadParameter(f"--protect {text!r}: write FIRST:STOP, like 0:128")
    return range(int(first), int(stop))
