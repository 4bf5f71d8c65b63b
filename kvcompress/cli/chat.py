"""`kvcompress chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.common import JsonOption, MapOption, console, emit, refuse_unread
from kvcompress.cli.progress import progress
from kvcompress.cli.words import completed


def command(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Directory made by kvcompress export.")],
    system: Annotated[str, typer.Option(help="First message: how to answer.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, more samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: MapOption = "cpu",
    json_: JsonOption = False,
) -> None:
    """Converse with a model on one compressed cache. Each line of stdin is a turn.

    Example: `printf 'My name is Ada.\\nWhat is my name?\\n' | kvcompress chat bundle`
    """
    from kvcompress.bundle.load import load
    from kvcompress.runtime.conversation import Conversation

    if temperature == 0:
        refuse_unread(context, "without --temperature above 0", "seed")
    with progress(f"loading {bundle}"):
        model, tokenizer = load(bundle, device_map=device)
    talk = Conversation(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
        stream=not json_,
    )
    replies = []
    for text in _lines():
        reply = talk.say(text)
        replies.append({"said": text, **asdict(reply)})
        if reply.read_again:
            console().print(
                "the chat template writes the earlier turns otherwise than they were: all was read "
                "again, into a new cache"
            )
        if not json_:
            console().print(completed(reply.completion))
    if json_:
        emit(replies, json_)


def _lines() -> Iterator[str]:
    """Lines of stdin that hold something, each asked for where somebody types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
