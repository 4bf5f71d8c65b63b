"""Workloads for real pretrained models: real text, short answers, the model's own chat template.

The true answer is fed and scored token by token, so that a method is also told apart from others
where no answer is right. Questions come after the document was compressed, but for
`facts_visible`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvcompress.evaluate.drawing import Draw, Drawn, Question, Workload
from kvcompress.tasks.documents import Note
from kvcompress.tasks.facts import (
    alike,
    asked,
    chain,
    chain_line,
    constants,
    facts,
    pass_keys,
)

SPANS: Final = 16  # quotations asked of one document
_TOLD: Final = 3  # facts of the first turn
_SHOTS: Final = 2  # notes that are told again before one is asked for
_LAST_WORD: Final = " is"  # of a question about a fact
_QUOTED_WORDS: Final = 20
_SPAN_WORDS: Final = 8
_CHAINS: Final = 16  # asked behind one prompt of worked chains


def _facts(draw: Draw) -> Drawn:
    return _completed(draw, facts(draw.rng, draw.sizes.facts))


def _alike(draw: Draw) -> Drawn:
    return _completed(draw, alike(draw.rng, draw.sizes.facts))


def _pass_keys(draw: Draw) -> Drawn:
    return _completed(draw, pass_keys(draw.rng, draw.sizes.facts))


def _constants(draw: Draw) -> Drawn:
    return _completed(draw, constants(draw.rng, draw.sizes.facts), end="")


def _completed(draw: Draw, notes: Sequence[Note], end: str = ".", room: int = 0) -> Drawn:
    """Behind the document stand two of its notes again and the beginning of a third: a question
    that a base model, too, understands.

    Args:
        end: of a note.
        room: tokens that come behind the document.
    """
    text, questions = draw.lay_out(notes, draw.sizes.context_tokens - room)
    told = {note.question: note.answer for note in notes[:_SHOTS]}
    shots = "".join(f"\n{stem}{answer}{end}" for stem, answer in told.items())
    asks = [q for q in questions if q.text not in told]
    return Drawn(text, [Question(f"{shots}\n{q.text}", q.answer, q.depth) for q in asks])


def _next_turn(draw: Draw) -> Drawn:
    """One turn asks for facts and gets them; the next, about another, comes after compression."""
    notes = facts(draw.rng, draw.sizes.facts)
    told, notes = notes[:_TOLD], notes[_TOLD:]
    questions = " ".join(asked(note.question) for note in told)
    answers = " ".join(note.line.strip() for note in told)
    lines = "".join(note.line for note in told)

    def framed(document: str, stem: str) -> tuple[str, str]:
        """What is compressed, and the next turn up to the answer."""
        first = f"{document}{lines}\n{questions}", answers
        if draw.chat is None:
            return "\n".join([*first, ""]), f"{asked(stem)}\n{stem}"
        roles = zip(("user", "assistant", "user"), (*first, asked(stem)), strict=True)
        whole = draw.chat([{"role": role, "content": content} for role, content in roles])
        cut = whole.rindex(asked(stem))
        return whole[:cut], whole[cut:] + stem

    some = notes[0].question
    room = draw.sizes.context_tokens - draw.count_tokens(framed("", some)[0])
    text, laid = draw.lay_out(notes, room)
    asks = [Question(framed("", q.text)[1], q.answer, q.depth) for q in laid]
    return Drawn(framed(text, some)[0], asks, begun=draw.chat is not None)


def _visible(draw: Draw) -> Drawn:
    """As `_facts` with one question, of which only the last word comes after compression."""
    notes = facts(draw.rng, draw.sizes.facts)
    room = (_SHOTS + 1) * max(draw.count_tokens(note.line) for note in notes)
    drawn = _completed(draw, notes, room=room)
    question = draw.rng.choice(drawn.questions)
    seen, last, _ = question.text.rpartition(_LAST_WORD)
    return Drawn(drawn.prompt + seen, [Question(last, question.answer, question.depth)])


def _verbatim(draw: Draw) -> Drawn:
    """Some words of the document are quoted, and its next ones have to follow. It is one line, as
    most tokenizers join spaces and line ends: a word then has the same tokens wherever it begins.
    """
    words = draw.lay_out([], draw.sizes.context_tokens)[0].split()
    length = _QUOTED_WORDS + _SPAN_WORDS
    questions = []
    for start in draw.rng.sample(range(len(words) - length), min(SPANS, len(words) - length)):
        quoted = " ".join(words[start : start + _QUOTED_WORDS])
        first, *more = (f" {word}" for word in words[start + _QUOTED_WORDS : start + length])
        rest = tuple(("", word) for word in more)
        questions.append(Question(f"\n\nIt says: {quoted}", first, start / len(words), rest))
    return Drawn(" ".join(words), questions)


def _arithmetic(draw: Draw) -> Drawn:
    """Worked chains of small sums, then new ones of which every result is asked for."""
    lines: list[str] = []
    used = 0
    while True:
        line = chain_line(chain(draw.rng))
        used += draw.count_tokens(line)
        if used > draw.sizes.context_tokens:
            break
        lines.append(line)
    questions = []
    for _ in range(_CHAINS):
        (text, answer), *more = chain(draw.rng)
        steps = tuple((f",{each}", result) for each, result in more)
        questions.append(Question(f"Chain:{text}", answer, 1.0, steps))
    return Drawn("".join(lines), questions)


REAL: Final[dict[str, Workload]] = {
    "facts": Workload(
        "R1",
        "facts in prose, asked for after it was compressed",
        _facts,
        24,
        source="prose",
        fed=True,
    ),
    "facts_visible": Workload(
        "R2",
        "facts in prose, compressed with the question",
        _visible,
        1,
        source="prose",
        fed=True,
    ),
    "multi_key": Workload(
        "R3",
        "facts whose keys share their words, question unknown while compressed",
        _alike,
        24,
        source="prose",
        fed=True,
    ),
    "passkey": Workload(
        "R4",
        "pass keys of four digits in prose, question unknown",
        _pass_keys,
        24,
        source="prose",
        fed=True,
    ),
    "symbols": Workload(
        "R5", "constants in real code, question unknown", _constants, 24, source="code", fed=True
    ),
    "next_turn": Workload(
        "R6",
        "a chat turn in the prompt, the next turn asks for another fact",
        _next_turn,
        24,
        source="prose",
        fed=True,
    ),
    "verbatim": Workload(
        "R7",
        "the next eight words of a quotation from the document",
        _verbatim,
        SPANS,
        source="prose",
        fed=True,
    ),
    "arithmetic": Workload(
        "R8", "chains of eight small sums after worked ones", _arithmetic, _CHAINS, fed=True
    ),
    "own_text": Workload(
        "R9",
        "the model's own continuation with the full cache, fed again",
        None,
        source="prose",
        text=True,
        own=True,
    ),
    "prose": Workload("R10", "held-out prose", None, source="prose", text=True),
    "code": Workload("R11", "held-out code", None, source="code", text=True),
    "chat": Workload("R12", "held-out prose as turns of a chat", None, source="chat", text=True),
}
