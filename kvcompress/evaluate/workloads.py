"""Ways to use a cache, on which methods of compression rank differently, and how they are drawn.

In the six of `WORKLOADS` a prompt is compressed before anybody knows what will be asked, and notes
and questions have the form of `tasks.documents`, so that any causal model can answer by copying
from its context. Those of `real.REAL` are for pretrained models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.drawing import (
    Draw,
    Drawn,
    Messages,
    Sizes,
    Source,
    Workload,
    WorkloadSample,
    WorkloadSuite,
)
from kvcompress.evaluate.real import REAL
from kvcompress.evaluate.runner import Document
from kvcompress.evaluate.suite import text_windows
from kvcompress.tasks.documents import HELD_OUT, read_text, recall_notes
from kvcompress.tasks.stdlib_text import code, prose

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    GoOn = Callable[[Tensor, int], Tensor]


def _hidden(draw: Draw) -> Drawn:
    notes = recall_notes(draw.rng, draw.sizes.notes, draw.sizes.max_words)
    return Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


def _second_turn(draw: Draw) -> Drawn:
    """The prompt ends with one question and its answer; that note is not asked for again."""
    notes = recall_notes(draw.rng, draw.sizes.notes, draw.sizes.max_words)
    first = draw.rng.choice(notes)
    turn = f"{first.question}{first.answer}\n"
    room = draw.sizes.context_tokens - draw.count_tokens(turn)
    text, questions = draw.lay_out(notes, room)
    asked = [question for question in questions if question.text != first.question]
    drawn = Drawn(text + turn, asked)
    return Drawn(drawn.prompt, drawn.at(0.0, len(text) / len(drawn.prompt)))


def _long_span(draw: Draw) -> Drawn:
    low, high = draw.sizes.long_words
    notes = recall_notes(draw.rng, draw.sizes.notes, high, low)
    return Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


def _beyond(draw: Draw) -> Drawn:
    """Ordinary text, then notes in the newest quarter."""
    sizes = draw.sizes
    newest = sizes.context_tokens // 4
    before, _ = draw.lay_out([], sizes.context_tokens - newest)
    notes = recall_notes(draw.rng, max(1, sizes.notes * 2 // 3), max(1, sizes.max_words // 2))
    text, questions = draw.lay_out(notes, newest)
    drawn = Drawn(before + text, questions)
    start = len(before) / len(drawn.prompt)
    return Drawn(drawn.prompt, drawn.at(start, 1 - start))


def _long_generation(draw: Draw) -> Drawn:
    """A third of the notes stands in the prompt, a fifth of the length; the rest is generated."""
    sizes = draw.sizes
    notes = recall_notes(draw.rng, sizes.notes, max(1, sizes.max_words // 2))
    early, prompt_tokens = max(1, len(notes) // 3), sizes.context_tokens // 5
    prompt, first = draw.lay_out(notes[:early], prompt_tokens)
    generated, second = draw.lay_out(notes[early:], sizes.context_tokens - prompt_tokens)
    start = len(prompt) / len(prompt + generated)
    asked = Drawn(prompt, first).at(0.0, start) + Drawn(prompt, second).at(start, 1 - start)
    return Drawn(prompt, asked, generated)


def _instructions(draw: Draw) -> Drawn:
    notes = recall_notes(draw.rng, draw.sizes.instructions, min(3, draw.sizes.max_words))
    return Drawn(*draw.lay_out(notes, draw.sizes.context_tokens))


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


KNOWN: Final[dict[str, Workload]] = {**WORKLOADS, **REAL}


# ---- drawing
def make_workloads(
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    *,
    names: Sequence[str] = tuple(WORKLOADS),
    samples: int = 24,
    text: Path | str | None = None,
    seed: int = 0,
    go_on: GoOn | None = None,
) -> tuple[WorkloadSuite, ...]:
    """Draw the suites of the workloads `names`; the same arguments give the same suites.

    Args:
        names: in `KNOWN`.
        samples: scored per workload that asks questions.
        text: file of held-out text, for the windows and between the notes; None takes the
            workload's own source.
        go_on: so many tokens behind prefixes ``[W, T]`` as the model generates them, for
            `own_text`; see `workloads_run.own_continuation`.

    Raises:
        ValueError: for an unknown workload, a context too short for its notes, or `own_text`
            without a model.
        KVCompressError: if the text cannot be read.
    """
    unknown = sorted(set(names) - set(KNOWN))
    if unknown:
        known = ", ".join(KNOWN)
        raise ValueError(f"unknown workload {', '.join(unknown)}: choose from {known}")
    chat = partial(_as_chat, tokenizer) if tokenizer.chat_template else None
    suites = []
    for name in names:
        workload = KNOWN[name]
        beyond = workload.beyond
        length = 2 * sizes.max_position if beyond else sizes.context_tokens
        given = replace(sizes, context_tokens=length)
        filler = _source(workload.source, chat) if text is None else read_text(text)
        documents, drawn = _documents(Grader(tokenizer), name, samples, given, filler, seed, chat)
        cut = None
        if sizes.windows and workload.text:
            count = max(1, sizes.windows // 2) if beyond else sizes.windows
            where, more = str(text or workload.source), sizes.continuation_tokens
            cut = text_windows(tokenizer, filler, count, length + more, where)
            if workload.own:
                cut = _continued(cut[:, :length], more, name, go_on)
        suites.append(
            WorkloadSuite(
                workload=name,
                documents=documents,
                samples=drawn,
                context_tokens=length,
                windows=cut,
                chunk_tokens=max(1, sizes.max_position // 2) if beyond else None,
                beyond=beyond,
                fed=workload.fed,
                seed=seed,
            )
        )
    return tuple(suites)


def _as_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _source(source: Source, chat: Callable[[Messages], str] | None) -> str:
    """The text that a workload is about, or that stands between its notes."""
    if source == "held_out":
        return read_text(HELD_OUT)
    if source == "code":
        return code("evaluation")
    text = prose("evaluation")
    if source == "prose" or chat is None:
        return text
    messages = []
    for paragraph in text.split("\n\n"):
        messages.append({"role": "user", "content": "What else does the manual say?"})
        messages.append({"role": "assistant", "content": paragraph})
    return chat(messages)


def _continued(prefix: Tensor, tokens: int, name: str, go_on: GoOn | None) -> Tensor:
    import torch

    if go_on is None:
        raise ValueError(f"{name}: is about what the model itself says: give go_on")
    return torch.cat([prefix, go_on(prefix, tokens)], dim=1)


def _documents(
    grader: Grader,
    name: str,
    samples: int,
    sizes: Sizes,
    filler: str,
    seed: int,
    chat: Callable[[Messages], str] | None,
) -> tuple[tuple[Document, ...], tuple[WorkloadSample, ...]]:
    workload = KNOWN[name]
    texts: list[tuple[list[int], list[int]]] = []
    made: list[WorkloadSample] = []
    while workload.draw is not None and len(made) < samples:
        rng = random.Random(f"{seed} {name} {len(texts)}")
        draw = Draw(rng, sizes, filler, lambda piece: len(grader.encode(piece, begin=True)), chat)
        drawn = workload.draw(draw)
        asked = rng.sample(drawn.questions, min(workload.asked, len(drawn.questions)))
        groups = [asked] if workload.together else [[question] for question in asked]
        made += [WorkloadSample(len(texts), tuple(group)) for group in groups]
        prompt = grader.encode(drawn.prompt, begin=not drawn.begun)
        texts.append((prompt, grader.encode(drawn.generated)))
    return _as_documents(texts), tuple(made[:samples])


def _as_documents(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[Document, ...]:
    """Rows of a batch generate together: where one would generate more, its prompt is longer."""
    shortest = min((len(generated) for _, generated in texts), default=0)
    documents = []
    for prompt, generated in texts:
        spare = len(generated) - shortest
        documents.append(Document(tuple(prompt + generated[:spare]), tuple(generated[spare:])))
    return tuple(documents)
