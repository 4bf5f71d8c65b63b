"""Built-in calibration for real models: prompts that ask about real text, and text alone.

Three prompts in four ask for what stands far above, because only a question shows which heads look
far back; plain text and code show the rest. The rows that are measured are the last of each prompt,
so questions and answers fill at least those. In two of three nothing is asked before them, so that
a head's tokens are chosen before anybody knows the question; in the third, earlier questions vote.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvcompress.profile.builtin import questions
from kvcompress.profile.builtin.real_text import code, prose
from kvcompress.profile.builtin.writing import Write, as_conversation, as_reading, as_source
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.kinds import Kind, Prompt
from kvcompress.recipe import Calibration
from kvcompress.runtime.model.chat import has_template
from kvcompress.tasks.documents import Note, lay_out
from kvcompress.tokenizer import ids_after, opening_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of eight prompts, and again; every first four have what is asked most and plain text
ORDER: Final[tuple[Kind, ...]] = (
    *("facts", "code", "chat", "text"),
    *("facts", "quote", "code", "text"),
)
_SENTENCE: Final = r"\w['\")]*\.\s+"  # what a planted fact may follow
_STATEMENT: Final = r"\n\n {0,4}"  # and a constant: a blank line, where little is indented
_REMARK: Final = "Remember this for later: "


def real_prompts(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, texts: bool = True
) -> list[Prompt]:
    """See the module docstring; every prompt has `calibration.tokens` tokens.

    Args:
        texts: whether plain text is among them.

    Raises:
        CalibrationError: if the tokenizer's chat template cannot write them.
    """
    opening = opening_ids(tokenizer)
    fresh = calibration.tokens - len(opening)
    order = [kind for kind in ORDER if texts or kind != "text"]

    def encode(text: str) -> list[int]:
        return ids_after(tokenizer, text, opening)

    prompts = []
    for number in range(calibration.prompts):
        rng = random.Random(f"{calibration.seed} {number}")
        kind = order[number % len(order)]
        ids = None
        if kind != "text":
            asking = _asking(kind, rng, tokenizer, encode)
            hidden = (number + number // len(order)) % 3 != 1
            ids = _asked(rng, asking, fresh, encode, hidden)
        if ids is None:  # too short for a question
            kind, ids = "text", _plain(rng, (prose, code)[number // 4 % 2](), fresh, encode)
        prompts.append(Prompt(opening + ids, kind))
    return prompts


@dataclass(frozen=True, slots=True)
class _Asking:
    """How one kind of prompt is made.

    Attributes:
        text: what it asks about.
        planted: notes to plant in it.
        after: what a planted note may follow.
        asked: the questions about a document, given the notes planted in it.
        write: a document and questions as one text.
    """

    text: str
    planted: list[Note]
    after: str
    asked: Callable[[str, list[Note]], list[Note]]
    write: Write


def _asking(
    kind: Kind,
    rng: random.Random,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[str], list[int]],
) -> _Asking:
    spoken = has_template(tokenizer)

    def shuffled(document: str, notes: list[Note]) -> list[Note]:
        return rng.sample(notes, len(notes))

    def quoted(document: str, notes: list[Note]) -> list[Note]:
        return questions.quotes(rng, document, 48, lambda text: len(encode(text)))

    def defined(document: str, notes: list[Note]) -> list[Note]:
        found = [*notes, *questions.signatures(rng, document, spoken)[: 2 * len(notes)]]
        return rng.sample(found, len(found))

    if kind == "facts":
        write = as_reading(tokenizer, "Read this text. I will ask about it.")
        return _Asking(prose(), questions.facts(rng), _SENTENCE, shuffled, write)
    if kind == "chat":
        told = questions.facts(rng, _REMARK)
        return _Asking(prose(), told, _SENTENCE, shuffled, as_conversation(tokenizer))
    if kind == "quote":
        text = rng.choice((prose, code))()
        write = as_reading(tokenizer, "Read this text. I will ask you to repeat parts of it.")
        return _Asking(text, [], "", quoted, write)
    write = as_reading(tokenizer, "Read this code. I will ask about it.") if spoken else as_source
    return _Asking(code(), questions.constants(rng, spoken), _STATEMENT, defined, write)


def _asked(
    rng: random.Random,
    asking: _Asking,
    length: int,
    encode: Callable[[str], list[int]],
    hidden: bool,
) -> list[int] | None:
    """A document and its questions, exactly `length` tokens; None where these are too few.

    Args:
        hidden: no question is asked before the rows that are measured; the first may begin.
    """

    def count(document: str) -> int:
        return len(encode(asking.write(document, [])))

    rows = held_out_rows(length)
    asked_tokens = rows if hidden else max(rows + 16, int(length * rng.uniform(0.12, 0.25)))
    room = length - asked_tokens - count("")
    planted = _fitting(asking.planted, int(room * rng.uniform(0.08, 0.3)), encode)
    if room < rows // 2 or (asking.planted and not planted):
        return None
    document, order, _ = lay_out(
        rng, planted, asking.text, length - asked_tokens, count, asking.after
    )
    notes = asking.asked(document, order)
    if not notes:
        return None
    ids: list[int] = []
    repeated = list(notes)
    while len(ids := encode(asking.write(document, repeated))) < length:
        repeated += rng.sample(notes, len(notes))
    return ids[:length]


def _fitting(
    notes: Sequence[Note], room_tokens: int, encode: Callable[[str], list[int]]
) -> list[Note]:
    """As many of `notes` as fit into `room_tokens`."""
    fitting: list[Note] = []
    for note in notes:
        room_tokens -= len(encode(note.line))
        if room_tokens < 0:
            break
        fitting.append(note)
    return fitting


def _plain(
    rng: random.Random, text: str, length: int, encode: Callable[[str], list[int]]
) -> list[int]:
    """`length` tokens of `text` from the beginning of a line on; it begins anew after its end."""
    start = text.find("\n", rng.randrange(len(text))) + 1
    around, characters = text[start:] + text[:start], 4 * length
    while True:
        times = 1 + characters // len(around)
        ids = encode((around * times)[:characters])
        if len(ids) > length:  # the last token may be half a word
            return ids[:length]
        characters *= 2
