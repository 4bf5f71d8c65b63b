"""Six ways to use a cache, on which methods of compression rank differently.

In all of them a prompt is compressed before anybody knows what will be asked. Notes and questions
have the form of `tasks`, so that any causal model can answer by copying from its context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.runner import Document
from kvcompress.evaluate.suite import text_windows
from kvcompress.tasks.documents import HELD_OUT, Note, lay_out, read_text, recall_notes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


# ---- what a suite holds
@dataclass(frozen=True, slots=True)
class Question:
    """Asked after everything before it was compressed.

    Attributes:
        text: ends where the answer begins.
        answer: expected continuation, up to and with its closing period.
        depth: place of the note in all that the cache has seen, 0 (start) to 1 (end).
    """

    text: str
    answer: str
    depth: float


@dataclass(frozen=True, slots=True)
class WorkloadSample:
    """What is scored as one: the share of its questions, each asked on a copy of the cache."""

    document: int
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class WorkloadSuite:
    """One workload, drawn once and shared by everything that is compared on it.

    Attributes:
        workload: name in `WORKLOADS`.
        context_tokens: length of what a document shows the cache, and of a window's prefix.
        windows: ``[W, context_tokens + continuation]`` int64 of held-out text; None for none.
        chunk_tokens: prompts and prefixes are fed in parts of so many tokens; None: at once.
        feed_tokens: tokens of a window's continuation that one forward takes.
        beyond: positions past the model's `max_position` are wanted.
    """

    workload: str
    documents: tuple[Document, ...]
    samples: tuple[WorkloadSample, ...]
    context_tokens: int
    windows: Tensor | None = None
    chunk_tokens: int | None = None
    feed_tokens: int = 16
    beyond: bool = False
    seed: int = 0


# ---- how a document of each workload is drawn
@dataclass(frozen=True, slots=True)
class Sizes:
    """How large documents are.

    Attributes:
        notes: per document; `instructions` of them in the workload of that name.
        max_words: longest answer where the workload does not fix it.
        long_words: shortest and longest answer of `long_span`.
    """

    context_tokens: int
    max_position: int
    notes: int = 12
    instructions: int = 32
    max_words: int = 16
    long_words: tuple[int, int] = (9, 16)


@dataclass(frozen=True, slots=True)
class _Draw:
    rng: random.Random
    sizes: Sizes
    filler: str
    count_tokens: Callable[[str], int]

    def lay_out(self, notes: Sequence[Note], tokens: int) -> tuple[str, list[Question]]:
        """A document of `tokens` tokens, and the questions to its notes in their order."""
        text, order, depths = lay_out(self.rng, notes, self.filler, tokens, self.count_tokens)
        pairs = zip(order, depths, strict=True)
        return text, [Question(note.question, note.answer, depth) for note, depth in pairs]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The text that is prefilled, the text that is forced, and what may be asked."""

    prompt: str
    questions: list[Question]
    generated: str = ""

    def at(self, start: float, share: float) -> list[Question]:
        """The questions, where the text they were laid out in is a part of the whole."""
        return [Question(q.text, q.answer, start + share * q.depth) for q in self.questions]


def _hidden(draw: _Draw) -> _Drawn:
    notes = recall_notes(draw.rng, draw.sizes.notes, draw.sizes.max_words)
    return _Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


def _second_turn(draw: _Draw) -> _Drawn:
    """The prompt ends with one question and its answer; that note is not asked for again."""
    notes = recall_notes(draw.rng, draw.sizes.notes, draw.sizes.max_words)
    first = draw.rng.choice(notes)
    turn = f"{first.question}{first.answer}\n"
    room = draw.sizes.context_tokens - draw.count_tokens(turn)
    text, questions = draw.lay_out(notes, room)
    asked = [question for question in questions if question.text != first.question]
    drawn = _Drawn(text + turn, asked)
    return _Drawn(drawn.prompt, drawn.at(0.0, len(text) / len(drawn.prompt)))


def _long_span(draw: _Draw) -> _Drawn:
    low, high = draw.sizes.long_words
    notes = recall_notes(draw.rng, draw.sizes.notes, high, low)
    return _Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


def _beyond(draw: _Draw) -> _Drawn:
    """Ordinary text, then notes in the newest quarter."""
    sizes = draw.sizes
    newest = sizes.context_tokens // 4
    before, _ = draw.lay_out([], sizes.context_tokens - newest)
    notes = recall_notes(draw.rng, max(1, sizes.notes * 2 // 3), max(1, sizes.max_words // 2))
    text, questions = draw.lay_out(notes, newest)
    drawn = _Drawn(before + text, questions)
    start = len(before) / len(drawn.prompt)
    return _Drawn(drawn.prompt, drawn.at(start, 1 - start))


def _long_generation(draw: _Draw) -> _Drawn:
    """A third of the notes stands in the prompt, a fifth of the length; the rest is generated."""
    sizes = draw.sizes
    notes = recall_notes(draw.rng, sizes.notes, max(1, sizes.max_words // 2))
    early, prompt_tokens = max(1, len(notes) // 3), sizes.context_tokens // 5
    prompt, first = draw.lay_out(notes[:early], prompt_tokens)
    generated, second = draw.lay_out(notes[early:], sizes.context_tokens - prompt_tokens)
    start = len(prompt) / len(prompt + generated)
    asked = _Drawn(prompt, first).at(0.0, start) + _Drawn(prompt, second).at(start, 1 - start)
    return _Drawn(prompt, asked, generated)


def _instructions(draw: _Draw) -> _Drawn:
    notes = recall_notes(draw.rng, draw.sizes.instructions, min(3, draw.sizes.max_words))
    return _Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


@dataclass(frozen=True, slots=True)
class Workload:
    """One way to use a cache.

    Attributes:
        axis: D1 to D6.
        summary: one line for tables and pages.
        asked: questions to each document.
        together: these questions are one sample, not one each.
        text: perplexity and KL on held-out text behind a prefix of the same length.
        beyond: the documents are twice as long as the model was trained on.
    """

    axis: str
    summary: str
    draw: Callable[[_Draw], _Drawn]
    asked: int = 6
    together: bool = False
    text: bool = False
    beyond: bool = False


WORKLOADS: Final[dict[str, Workload]] = {
    "hidden": Workload(
        "D1", "question unknown while the document is compressed", _hidden, text=True
    ),
    "second_turn": Workload("D2", "one turn in the prompt, the next one is scored", _second_turn),
    "long_span": Workload("D3", "answers of 9 to 16 words, word for word", _long_span),
    "beyond": Workload(
        "D4",
        "twice the trained length, notes in its newest quarter",
        _beyond,
        text=True,
        beyond=True,
    ),
    "long_generation": Workload(
        "D5", "a short prompt, then a long text decoded token by token", _long_generation
    ),
    "instructions": Workload(
        "D6", "many short independent notes, several asked", _instructions, asked=4, together=True
    ),
}


# ---- drawing
def make_workloads(
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: Sequence[str] = tuple(WORKLOADS),
    samples: int = 24,
    context_tokens: int = 960,
    max_position: int,
    windows: int = 8,
    continuation_tokens: int = 64,
    notes: int = 12,
    instructions: int = 32,
    max_words: int = 16,
    long_words: tuple[int, int] = (9, 16),
    text: Path | str = HELD_OUT,
    seed: int = 0,
) -> tuple[WorkloadSuite, ...]:
    """Draw the suites of the workloads `names`; the same arguments give the same suites.

    Args:
        samples: scored per workload.
        context_tokens: length of each document, begin token included; `beyond` takes
            ``2 * max_position`` in place of it.
        max_position: positions that the model was trained on.
        windows: windows of held-out text, where the workload has them; 0 for none. `beyond`, where
            they are longer, takes half as many.
        notes, instructions, max_words, long_words: see `Sizes`.
        text: file of held-out text, for the windows and between the notes.

    Raises:
        ValueError: for an unknown workload, or a context too short for its notes.
        KVCompressError: if `text` cannot be read.
    """
    unknown = sorted(set(names) - set(WORKLOADS))
    if unknown:
        known = ", ".join(WORKLOADS)
        raise ValueError(f"unknown workload {', '.join(unknown)}: choose from {known}")
    filler = read_text(text)
    suites = []
    for name in names:
        beyond = WORKLOADS[name].beyond
        length = 2 * max_position if beyond else context_tokens
        sizes = Sizes(length, max_position, notes, instructions, max_words, long_words)
        documents, drawn = _documents(Grader(tokenizer), name, samples, sizes, filler, seed)
        cut = None
        if windows and WORKLOADS[name].text:
            count = max(1, windows // 2) if beyond else windows
            cut = text_windows(tokenizer, filler, count, length + continuation_tokens, str(text))
        suites.append(
            WorkloadSuite(
                workload=name,
                documents=documents,
                samples=drawn,
                context_tokens=length,
                windows=cut,
                chunk_tokens=max(1, max_position // 2) if beyond else None,
                beyond=beyond,
                seed=seed,
            )
        )
    return tuple(suites)


def _documents(
    grader: Grader, name: str, samples: int, sizes: Sizes, filler: str, seed: int
) -> tuple[tuple[Document, ...], tuple[WorkloadSample, ...]]:
    workload = WORKLOADS[name]
    texts: list[tuple[list[int], list[int]]] = []
    made: list[WorkloadSample] = []
    while len(made) < samples:
        rng = random.Random(f"{seed} {name} {len(texts)}")
        draw = _Draw(rng, sizes, filler, lambda piece: len(grader.encode(piece, begin=True)))
        drawn = workload.draw(draw)
        asked = rng.sample(drawn.questions, min(workload.asked, len(drawn.questions)))
        groups = [asked] if workload.together else [[question] for question in asked]
        made += [WorkloadSample(len(texts), tuple(group)) for group in groups]
        texts.append((grader.encode(drawn.prompt, begin=True), grader.encode(drawn.generated)))
    return _as_documents(texts), tuple(made[:samples])


def _as_documents(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[Document, ...]:
    """Rows of a batch generate together: where one would generate more, its prompt is longer."""
    shortest = min(len(generated) for _, generated in texts)
    documents = []
    for prompt, generated in texts:
        spare = len(generated) - shortest
        documents.append(Document(tuple(prompt + generated[:spare]), tuple(generated[spare:])))
    return tuple(documents)
