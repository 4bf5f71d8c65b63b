"""Documents and their questions as a model expects them: by its chat template, or as plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from kvcompress.errors import CalibrationError, KVCompressError
from kvcompress.runtime.model.chat import conversation_text, has_template
from kvcompress.tasks.documents import Note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[[str, Sequence[Note]], str]  # a document and the questions asked about it
PARTS: Final = 4  # turns over which a conversation spreads its document


def as_reading(tokenizer: PreTrainedTokenizerBase, request: str) -> Write:
    """One message with a request and the whole document, then a turn for each question."""

    def write(document: str, notes: Sequence[Note]) -> str:
        opening = [(f"{request}\n\n{document}", "I have read it.")]
        return _conversation(tokenizer, [*opening, *_turns(notes)])

    return write


def as_conversation(tokenizer: PreTrainedTokenizerBase) -> Write:
    """The document in several turns, and in later turns the questions about it."""

    def write(document: str, notes: Sequence[Note]) -> str:
        lines = document.splitlines(keepends=True)
        count = max(1, min(PARTS, len(lines)))
        edges = [len(lines) * part // count for part in range(count + 1)]
        parts = ["".join(lines[a:b]) for a, b in pairwise(edges)]
        heard = [(part, _heard(part)) for part in parts]
        return _conversation(tokenizer, [*heard, *_turns(notes)])

    return write


def as_source(document: str, notes: Sequence[Note]) -> str:
    """Code that goes on with lines which need what stands above."""
    return f"{document}\n\n" + "".join(f"{note.question}{note.answer}\n" for note in notes)


def _turns(notes: Sequence[Note]) -> list[tuple[str, str]]:
    return [(note.question, note.answer) for note in notes]


def _heard(part: str) -> str:
    return f"I have read up to: {' '.join(part.split()[-6:])}"


def _conversation(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    """Pairs of what the user and the assistant say.

    Raises:
        CalibrationError: if the chat template refuses them or leaves out what they say.
    """
    if not has_template(tokenizer):
        return "".join(f"User: {asked}\nAssistant: {told}\n\n" for asked, told in turns)
    roles = ("user", "assistant")
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(roles, turn, strict=True)
    ]
    todo = "mend the template, remove it, or calibrate on your own text alone with --mix FILE=1"
    try:
        text = conversation_text(tokenizer, messages)
    except KVCompressError as error:
        raise CalibrationError(f"built-in calibration: {error}; {todo}") from None
    lost = [said for turn in turns[-1:] for said in turn if said.strip() not in text]
    if lost:
        raise CalibrationError(
            f"built-in calibration: the chat template leaves out what is said ({lost[0][:40]!r}); "
            f"{todo}"
        )
    return text
