"""What one evaluation runs: samples and text windows, drawn once and shared by all its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.tasks.documents import HELD_OUT, Sample, make_samples, read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Suite:
    """See the module docstring.

    Attributes:
        samples: questions to answer; empty to skip recall.
        windows: ``[W, context_tokens + continuation]`` int64, held-out text; None to skip it.
        feed_tokens: tokens of a continuation that go through the cache in one forward pass.
        batch_rows: rows evaluated together; changes time and memory, not the result.
    """

    samples: tuple[Sample, ...]
    windows: Tensor | None
    context_tokens: int
    seed: int = 0
    feed_tokens: int = 16
    batch_rows: int = 16


def make_suite(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("recall", "multi_key", "hops", "count"),
    samples: int = 24,
    context_tokens: int = 960,
    windows: int = 8,
    continuation_tokens: int = 64,
    notes_per_document: int = 12,
    max_words: int = 16,
    text: Path | str = HELD_OUT,
    seed: int = 0,
) -> Suite:
    """Draw the samples and windows of an evaluation; the same arguments give the same suite.

    Args:
        tasks: names in `tasks.TASKS`; none of them to skip recall.
        samples: questions per task.
        context_tokens: length of a document and of a text prefix, begin token included.
        windows: number of text windows; 0 skips perplexity and KL.
        text: file of held-out text, for the windows and between the notes.

    Raises:
        ValueError: for an unknown task, a context too short for its notes, or a text too short for
            one window.
        KVCompressError: if `text` cannot be read.
    """
    filler = read_text(text)

    def count_tokens(piece: str) -> int:
        return len(tokenizer(piece, verbose=False)["input_ids"])

    drawn = make_samples(
        count_tokens,
        tasks=tasks,
        samples=samples,
        context_tokens=context_tokens,
        notes_per_document=notes_per_document,
        max_words=max_words,
        filler=filler,
        seed=seed,
    )
    cut = None
    if windows:
        length = context_tokens + continuation_tokens
        cut = text_windows(tokenizer, filler, windows, length, str(text))
    return Suite(tuple(drawn), cut, context_tokens, seed)


def text_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, where: str
) -> Tensor:
    """`count` windows at even distances, each behind the tokenizer's begin token if it has one."""
    import torch

    begin = list(tokenizer("", verbose=False)["input_ids"])[:1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = length - len(begin)
    spare = len(ids) - body
    if spare < 0:
        raise ValueError(
            f"{where}: {len(ids)} tokens of text, a window needs {body}: give a longer text or a "
            "shorter context"
        )
    starts = [spare * place // max(1, count - 1) for place in range(count)]
    return torch.tensor([begin + ids[start : start + body] for start in starts])
