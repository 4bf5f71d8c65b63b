"""Which tokens of a conversation are its system prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress.errors import KVCompressError


def system_span(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> range:
    """The tokens that the system messages at the head of `messages` become, for ``protect=[…]``.

    They are what the chat template writes alike before any two different user messages.

    Raises:
        KVCompressError: if the tokenizer has no chat template, or no system message leads.
    """
    system = []
    for message in messages:
        if message["role"] != "system":
            break
        system.append(dict(message))
    if not system:
        raise KVCompressError("no system message leads the conversation; nothing to protect")
    if not getattr(tokenizer, "chat_template", None):
        raise KVCompressError(
            "the tokenizer has no chat template; give the range of tokens to protect by hand"
        )
    first, second = (_ids(tokenizer, [*system, _user(text)]) for text in ("Yes.", "42 of them"))
    same = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        same += 1
    return range(same)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
