"""What a workload is made of: its suite, and what draws one of its documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from kvcompress.evaluate.runner import Document
from kvcompress.tasks.documents import Note, lay_out

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["held_out", "prose", "code", "chat"]
LEAST_FACTS: Final = 4
MOST_FACTS: Final = 18
Messages = list[dict[str, str]]


# ---- what a suite holds
@dataclass(frozen=True, slots=True)
class Question:
    """Asked after everything before it was compressed.

    Attributes:
        text: ends where the answer begins.
        answer: expected continuation; up to and with its closing period where the model answers.
        depth: place of the note in all that the cache has seen, 0 (start) to 1 (end).
        more: further (text, answer) pairs behind it, where the true answers are fed.
    """

    text: str
    answer: str
    depth: float
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkloadSample:
    """What is scored as one: the share of its questions, each asked on a copy of the cache."""

    document: int
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class WorkloadSuite:
    """One workload, drawn once and shared by everything that is compared on it.

    Attributes:
        workload: name in `KNOWN`.
        documents, samples: empty where windows are all there is; these are the samples then.
        context_tokens: length of what a document shows the cache, and of a window's prefix.
        windows: ``[W, context_tokens + continuation]`` int64 of held-out text; None for none.
        chunk_tokens: prompts and prefixes are fed in parts of so many tokens; None: at once.
        feed_tokens: tokens of a window's continuation that one forward takes.
        beyond: positions past the model's `max_position` are wanted.
        fed: questions are fed with their true answers, which are scored; else the model answers.
    """

    workload: str
    documents: tuple[Document, ...]
    samples: tuple[WorkloadSample, ...]
    context_tokens: int
    windows: Tensor | None = None
    chunk_tokens: int | None = None
    feed_tokens: int = 16
    beyond: bool = False
    fed: bool = False
    seed: int = 0


# ---- how a document of each workload is drawn
@dataclass(frozen=True, slots=True)
class Sizes:
    """How large documents and windows of text are.

    Attributes:
        context_tokens: of a document and of a window's prefix, begin token included; the workload
            `beyond` takes ``2 * max_position`` in place of it.
        max_position: positions that the model was trained on.
        notes: per document; `instructions` of them in the workload of that name, and `facts` in
            documents for real models: most of these stay prose.
        max_words: longest answer where the workload does not fix it.
        long_words: shortest and longest answer of `long_span`.
        windows: windows of held-out text, where the workload has them; 0 for none. `beyond`, where
            they are longer, takes half as many.
        continuation_tokens: of a window, behind its prefix.
    """

    context_tokens: int
    max_position: int
    notes: int = 12
    instructions: int = 32
    max_words: int = 16
    long_words: tuple[int, int] = (9, 16)
    windows: int = 8
    continuation_tokens: int = 64

    @property
    def facts(self) -> int:
        return max(LEAST_FACTS, min(MOST_FACTS, self.context_tokens // 50))


@dataclass(frozen=True, slots=True)
class Draw:
    """What one document is drawn with.

    Attributes:
        chat: messages in the words of the model's chat template, open for an answer; None where
            the tokenizer has no template.
    """

    rng: random.Random
    sizes: Sizes
    filler: str
    count_tokens: Callable[[str], int]
    chat: Callable[[Messages], str] | None = None

    def lay_out(self, notes: Sequence[Note], tokens: int) -> tuple[str, list[Question]]:
        """A document of `tokens` tokens, and the questions to its notes in their order."""
        text, order, depths = lay_out(self.rng, notes, self.filler, tokens, self.count_tokens)
        pairs = zip(order, depths, strict=True)
        return text, [Question(note.question, note.answer, depth) for note, depth in pairs]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The text that is prefilled, the text that is forced, and what may be asked.

    Attributes:
        begun: the prompt has its begin token in its text, as a chat template writes it.
    """

    prompt: str
    questions: list[Question]
    generated: str = ""
    begun: bool = False

    def at(self, start: float, share: float) -> list[Question]:
        """The questions, where the text they were laid out in is a part of the whole."""
        return [Question(q.text, q.answer, start + share * q.depth) for q in self.questions]


@dataclass(frozen=True, slots=True)
class Workload:
    """One way to use a cache.

    Attributes:
        axis: D1 to D6, R1 to R12 for real models.
        summary: one line for tables and pages.
        draw: makes a document; None where windows of text are all there is.
        asked: questions to each document.
        together: these questions are one sample, not one each.
        text: perplexity and KL on held-out text behind a prefix of the same length.
        beyond: the documents are twice as long as the model was trained on.
        source: where text comes from if none is given: the demo model's held-out text, or what
            every Python carries.
        fed: see `WorkloadSuite`.
        own: the windows go on as the model itself does with the full cache.
    """

    axis: str
    summary: str
    draw: Callable[[Draw], Drawn] | None
    asked: int = 6
    together: bool = False
    text: bool = False
    beyond: bool = False
    source: Source = "held_out"
    fed: bool = False
    own: bool = False
