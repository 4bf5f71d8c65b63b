"""Recall tasks made from any tokenizer: a document of notes between ordinary text, then questions.

A note is one line, ``Note: amber river copper lemon.``: a two-word key, then the words to recall.
A question repeats the key, ``Ask: amber river``, and the answer is what followed it. The form is
plain in-context copying, which a base model of any size can do, so a wrong answer is a fact about
the memory and not about instruction following.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from kvcompress.errors import KVCompressError
from kvcompress.tasks.words import COUNT_WORDS, KEY_WORDS, VALUE_WORDS

ADJECTIVES: Final = KEY_WORDS[0::2]
NOUNS: Final = KEY_WORDS[1::2]
HELD_OUT: Final = Path(__file__).parent.parent / "demo" / "model" / "held_out.txt"
MULTI_KEYS: Final = 3
MULTI_KEY_WORDS: Final = 4


def read_text(path: Path | str) -> str:
    """A text file as a user gives one: UTF-8, with a byte-order mark or without.

    Raises:
        KVCompressError: if it cannot be read, or is something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise KVCompressError(f"{path}: cannot read the text ({error.strerror})") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise KVCompressError(f"{path}: byte 0x{byte:02x} is not UTF-8; it must be UTF-8") from None
    if "\0" in text:
        raise KVCompressError(f"{path}: holds a NUL byte; give a text file")
    return text


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the document, and the question that it answers."""

    line: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored question.

    Attributes:
        task: name of the task that made it.
        document: number of the context among those of one call; its questions share a prefill.
        context: the document; what a question-hidden run compresses.
        question: ends where the answer begins.
        answer: expected continuation, up to and with its closing period.
        depth: place of the note in the document, 0 (start) to 1 (end).
        span_words: number of words in the answer.
        follow_ups: further (question, answer) pairs, asked one after another on the same cache.
    """

    task: str
    document: int
    context: str
    question: str
    answer: str
    depth: float
    span_words: int
    follow_ups: tuple[tuple[str, str], ...] = ()


def recall_notes(rng: random.Random, count: int, max_words: int, min_words: int = 1) -> list[Note]:
    """`count` notes with distinct second key words, `min_words` to `max_words` to recall each."""
    notes = []
    for noun in rng.sample(NOUNS, count):
        key = f"{rng.choice(ADJECTIVES)} {noun}"
        values = " ".join(rng.choices(VALUE_WORDS, k=rng.randint(min_words, max_words)))
        notes.append(Note(f"Note: {key} {values}.\n", f"Ask: {key}", f" {values}."))
    return notes


def hop_notes(rng: random.Random, count: int, max_words: int) -> list[Note]:
    """Two-hop tracking: ``Link: A B.`` and ``Note: B value.``; the answer names B, then its value.

    The two lines of a hop are separate notes; only the link carries a question.
    """
    nouns = rng.sample(NOUNS, 2 * count)
    notes = []
    for first, second in zip(nouns[:count], nouns[count:], strict=True):
        start, end = f"{rng.choice(ADJECTIVES)} {first}", f"{rng.choice(ADJECTIVES)} {second}"
        values = " ".join(rng.choices(VALUE_WORDS, k=rng.randint(1, max_words)))
        notes.append(Note(f"Link: {start} {end}.\n", f"Follow: {start}", f" {end} {values}."))
        notes.append(Note(f"Note: {end} {values}.\n", "", ""))
    return notes


def count_notes(rng: random.Random, count: int) -> list[Note]:
    """Aggregation: a word is marked one to eight times; the answer is how often."""
    notes = []
    for noun in rng.sample(NOUNS, count):
        times = rng.randint(1, len(COUNT_WORDS) - 1)
        notes += [Note(f"Mark: {noun}.\n", "", "")] * (times - 1)
        notes.append(Note(f"Mark: {noun}.\n", f"Count: {noun}", f" {COUNT_WORDS[times]}."))
    return notes


def _counts_among_notes(rng: random.Random, count: int, max_words: int) -> list[Note]:
    """A quarter of the questions count; the plain notes between them are not asked for."""
    plain = recall_notes(rng, max(2, count // 3), max_words)
    silent = [Note(note.line, "", "") for note in plain]
    return count_notes(rng, max(1, min(8, count // 4))) + silent


def _hops(rng: random.Random, count: int, max_words: int) -> list[Note]:
    return hop_notes(rng, max(1, count // 2), max_words)


TASKS: Final[dict[str, Callable[[random.Random, int, int], list[Note]]]] = {
    "recall": recall_notes,
    "multi_key": recall_notes,
    "hops": _hops,
    "count": _counts_among_notes,
}


def make_samples(
    count_tokens: Callable[[str], int],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    samples: int = 24,
    context_tokens: int = 960,
    notes_per_document: int = 12,
    max_words: int = 16,
    filler: str | None = None,
    seed: int = 0,
) -> list[Sample]:
    """`samples` questions of each task; the same arguments give the same samples.

    Args:
        count_tokens: length of a string in tokens, as the model will see it.
        samples: questions per task; a document carries several, spread over its depth.
        context_tokens: length of each document; never above, and short of it by a few tokens.
        max_words: longest answer of `recall` and `hops`; multi-key answers have at most
            `MULTI_KEY_WORDS`, because `MULTI_KEYS` of them follow one another.
        filler: ordinary text between the notes; None reads the held-out text of the demo model.

    Raises:
        ValueError: for an unknown task, or a context too short for its notes.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
    text = HELD_OUT.read_text(encoding="utf-8") if filler is None else filler
    made: list[Sample] = []
    document = 0
    for task in tasks:
        words = min(max_words, MULTI_KEY_WORDS) if task == "multi_key" else max_words
        of_task: list[Sample] = []
        while len(of_task) < samples:
            rng = random.Random(f"{seed} {task} {len(of_task)}")
            notes = TASKS[task](rng, notes_per_document, words)
            context, order, depths = lay_out(rng, notes, text, context_tokens, count_tokens)
            of_task += _ask(rng, task, document, context, order, depths)
            document += 1
        made += of_task[:samples]
    return made


def _ask(
    rng: random.Random,
    task: str,
    document: int,
    context: str,
    notes: Sequence[Note],
    depths: Sequence[float],
) -> list[Sample]:
    """Every question that a document answers; for `multi_key` each begins a chain of them."""
    asked = [(note, depth) for note, depth in zip(notes, depths, strict=True) if note.question]
    rng.shuffle(asked)
    result = []
    for index, (note, depth) in enumerate(asked):
        follow_ups: tuple[tuple[str, str], ...] = ()
        if task == "multi_key":
            chain = (asked[(index + step) % len(asked)][0] for step in range(1, MULTI_KEYS))
            follow_ups = tuple((each.question, each.answer) for each in chain)
        span = len(note.answer.split())
        result.append(
            Sample(task, document, context, note.question, note.answer, depth, span, follow_ups)
        )
    return result


def lay_out(
    rng: random.Random,
    notes: Sequence[Note],
    filler: str,
    context_tokens: int,
    count_tokens: Callable[[str], int],
    after: str = "",
) -> tuple[str, list[Note], list[float]]:
    """Spread `notes` over a document of about `context_tokens` tokens, ordinary text between them.

    Args:
        filler: text to cut the pieces between notes from; a random place of it is used, and it is
            repeated where the document is longer.
        count_tokens: length of a string in tokens.
        after: pattern of the end of a text that a note may follow, as of a sentence; the note then
            stands in its paragraph, indented as what follows. Empty: a line of its own, anywhere.

    Returns:
        The document, the notes in the order in which they stand in it, and the depth of each.

    Raises:
        ValueError: if the notes alone are longer than `context_tokens`.
    """
    order = list(notes)
    rng.shuffle(order)
    needed = count_tokens("".join(note.line for note in order))
    if needed > context_tokens:
        raise ValueError(
            f"{len(order)} notes need {needed} tokens, more than the {context_tokens} of the "
            "context: ask for fewer or shorter notes, or a longer context"
        )
    cuts = [(place + rng.random()) / len(order) for place in range(len(order))]
    words = _pieces(rng, filler, context_tokens)
    allowed = [0, *(n for n, word in enumerate(words, 1) if re.search(rf"{after}\Z", word))]

    def assemble(used: int) -> list[str]:
        ends = [_nearest(allowed, round(cut * used), used) for cut in cuts]
        parts: list[str] = []
        start = 0
        for note, end in zip(order, ends, strict=True):
            if after:
                parts += _planted(words, start, end, note.line)
            else:
                parts += [_paragraph(words[start:end]), note.line]
            start = end
        return [*parts, _paragraph(words[start:used])]

    low, high = 0, len(words)  # the most filler that fits
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens("".join(assemble(middle))) <= context_tokens:
            low = middle
        else:
            high = middle - 1
    parts = assemble(low)
    starts = [sum(map(len, parts[: 2 * place + 1])) for place in range(len(order))]
    context = "".join(parts)
    return context, order, [start / len(context) for start in starts]


def _nearest(allowed: Sequence[int], wanted: int, last: int) -> int:
    """The first of `allowed` from `wanted` on, or the one before it where that is beyond `last`."""
    place = bisect_left(allowed, wanted)
    return allowed[place] if place < len(allowed) and allowed[place] <= last else allowed[place - 1]


def _planted(words: Sequence[str], start: int, end: int, line: str) -> tuple[str, str]:
    """The words as they are and the line, then again the white space that was before it."""
    last = words[end - 1] if end else "\n"
    gap = last[len(last.rstrip()) :]
    return "".join(words[start:end]), line.rstrip("\n") + gap[max(0, gap.rfind("\n")) :]


def _paragraph(words: Sequence[str]) -> str:
    return "".join(words).rstrip() + "\n" if words else ""


@lru_cache(4)
def _words(text: str) -> tuple[str, ...]:
    """Each with its white space."""
    return tuple(re.findall(r"\S+\s*", text))


def _pieces(rng: random.Random, filler: str, count: int) -> list[str]:
    """`count` consecutive words of `filler`, each with its white space, from a random one on."""
    words = _words(filler)
    if not words:
        return []
    start = rng.randrange(len(words))
    return [words[(start + step) % len(words)] for step in range(count)]
