"""Conversations as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from kvcompress.errors import KVCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# put before a template, it shadows the function that tells the date
_A_DAY: Final = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_TWO: Final = ("Yes.", "42 of them")  # two first messages of a user that share no beginning


def system_span(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> range:
    """The tokens that the system messages at the head of `messages` become, for ``protect=[…]``.

    The chat template writes two conversations that differ only in the user's message; the tokens
    before the first difference are the system messages.

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
    if not has_template(tokenizer):
        raise KVCompressError(
            "the tokenizer has no chat template; give the range of tokens to protect by hand"
        )
    try:
        first, second = (_written(tokenizer, [*system, _user(text)]) for text in _TWO)
    except KVCompressError as error:
        raise KVCompressError(
            f"no system message can be protected: {error}; put it at the head of the first user "
            "message, and give the range of tokens to protect by hand"
        ) from None
    left_out = [m["content"] for m in system if m["content"].strip() not in first]
    if left_out:
        raise KVCompressError(
            f"the chat template does not write the system message {left_out[0][:40]!r}; give the "
            "range of tokens to protect by hand"
        )
    same = 0
    for a, b in zip(_ids(tokenizer, first), _ids(tokenizer, second), strict=False):
        if a != b:
            break
        same += 1
    return range(same)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model's makers say how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def conversation_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    to_answer: bool = False,
) -> str:
    """The whole conversation.

    A template may write today's date. A conversation that is only read is written as of one day, so
    that calibration sees the same text tomorrow.

    Where the template has no system role, the system message goes to the head of the first user
    message, as the makers of such models advise.

    Args:
        to_answer: end where the assistant begins to answer.

    Raises:
        KVCompressError: if the tokenizer has no chat template, or its template refuses the roles.
    """
    turns = [dict(message) for message in messages]
    write = partial(_written, tokenizer, to_answer=to_answer, today=to_answer)
    try:
        return write(turns)
    except KVCompressError:
        if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
            raise
        asked = _user(f"{turns[0]['content']}\n\n{turns[1]['content']}")
        return write([asked, *turns[2:]])


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _written(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    to_answer: bool = False,
    today: bool = True,
) -> str:
    if not has_template(tokenizer):
        raise KVCompressError("the tokenizer has no chat template; give text in place of messages")
    template: str | None = None  # the tokenizer's own
    if not today and "strftime_now" in str(tokenizer.chat_template):
        template = f"{_A_DAY}{tokenizer.get_chat_template()}"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=template,
            add_generation_prompt=to_answer,
        )
        return str(text)
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise KVCompressError(f"the chat template refuses the conversation ({reason})") from None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
