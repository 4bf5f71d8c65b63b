"""The passes of one way to hold the cache: documents read, questions asked on copies, text fed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.serving import cache_bytes, host_bytes
from kvcompress.evaluate.session import Dialogue, Session, Turn, answer_logits, converse
from kvcompress.evaluate.text import window_logits
from kvcompress.measure.caches import storage_bytes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids that one row of the cache sees before a question.

    Attributes:
        prompt: prefilled, begin token included.
        generated: forced through the decode path behind it, one token at a time; as long in every
            document of a suite.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...] = ()


class Runner:
    """See the module docstring.

    Args:
        batch_rows: rows evaluated together; changes time and memory, not the result.
        chunk_tokens: prompts are fed in parts of so many tokens; None: at once.
        apart: one row at a time, each question on a twin of the cache. transformers' QuantizedCache
            needs that: a selection of rows reaches its residual alone, and what is padded or stands
            beside a row may change the constants of its codes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        grader: Grader,
        new_cache: Callable[[], Cache],
        batch_rows: int,
        chunk_tokens: int | None = None,
        apart: bool = False,
    ) -> None:
        self.model, self.grader, self.new_cache = model, grader, new_cache
        self.batch_rows = 1 if apart else batch_rows
        self.chunk_tokens, self.apart = chunk_tokens, apart
        self._held: dict[int, tuple[float, float]] = {}
        self._window_held: dict[int, tuple[float, float]] = {}

    @property
    def held_bytes(self) -> int:
        """Of a document's row when its first question comes, mean over documents; of a window's
        prefix where there are none."""
        return round(fmean(device for device, _ in (self._held or self._window_held).values()))

    @property
    def host_bytes(self) -> int:
        """As `held_bytes`, of the host memory of a recall tier."""
        return round(fmean(host for _, host in (self._held or self._window_held).values()))

    def session(self) -> Session:
        return Session(self.model, self.new_cache(), self.grader.pad_id)

    def ask(
        self,
        documents: Sequence[Document],
        asked: Sequence[tuple[int, Dialogue]],
        batches: Iterable[Sequence[int]] | None = None,
    ) -> None:
        """Every document read once, its cache copied for each of its questions.

        Args:
            asked: the number of a document and what it is asked; the answers are written there.
            batches: places in `asked` that are answered together; None: by document.
        """
        numbers = [number for number, _ in asked]
        for places, session, logits in self._copies(documents, numbers, batches):
            converse(session, logits, [asked[p][1] for p in places], self.grader.ends)

    def feed_answers(
        self, documents: Sequence[Document], asked: Sequence[tuple[int, Sequence[Turn]]]
    ) -> list[Tensor]:
        """As `ask`, with questions and true answers fed: the logits where the answers are due."""
        numbers = [number for number, _ in asked]
        found: dict[int, Tensor] = {}
        for places, session, logits in self._copies(documents, numbers):
            answers = answer_logits(session, logits, [asked[p][1] for p in places])
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(asked))]

    def _copies(
        self,
        documents: Sequence[Document],
        numbers: Sequence[int],
        batches: Iterable[Sequence[int]] | None = None,
    ) -> Iterator[tuple[Sequence[int], Session, Tensor]]:
        """Places in `numbers`, a session with a row for each, the logits behind their documents."""
        rows = len(numbers) if self.apart else self.batch_rows
        for batch in batches or document_batches(numbers, rows, alone=self.apart):
            read = sorted({numbers[place] for place in batch})
            session, logits = self._read(documents, read)
            if self.apart:
                yield from (([place], session.twin(), logits) for place in batch)
                continue
            chosen = [read.index(numbers[place]) for place in batch]
            session.select(chosen)
            yield batch, session, logits[chosen]

    def text_logits(
        self, windows: Tensor | None, context_tokens: int, feed_tokens: int
    ) -> Tensor | None:
        """Logits of every continuation behind its prefix; None without windows."""
        if windows is None:
            return None
        return window_logits(
            self.session,
            windows,
            context_tokens,
            feed_tokens=feed_tokens,
            batch_rows=self.batch_rows,
            chunk_tokens=self.chunk_tokens,
            read=self._weigh_window,
        )

    def _weigh_window(self, session: Session, places: range) -> None:
        """Bytes of windows count where there is no document to ask about."""
        self._window_held |= dict.fromkeys(places, self._weigh(session, len(places)))

    def _weigh(self, session: Session, rows: int) -> tuple[float, float]:
        cache = session.cache
        held = storage_bytes(cache.layers) if self.apart else cache_bytes(cache)
        return held / rows, host_bytes(cache) / rows

    def _read(
        self, documents: Sequence[Document], numbers: Sequence[int]
    ) -> tuple[Session, Tensor]:
        """Prefill, then force what is generated, token by token: that is how decoding stores it."""
        session = self.session()
        read = [documents[number] for number in numbers]
        logits = session.prefill([each.prompt for each in read], self.chunk_tokens)
        forced = torch.tensor([each.generated for each in read], device=logits.device).long()
        for token in forced.split(1, dim=1):
            if token.numel():
                logits = session.feed(token)[:, -1]
        self._held |= dict.fromkeys(numbers, self._weigh(session, len(read)))
        return session, logits


def document_batches(numbers: Sequence[int], rows: int, alone: bool = False) -> Iterator[list[int]]:
    """Places in `numbers`, the document of each question, in batches of at most `rows`.

    The questions of a document stay together, unless they are more than `rows`.

    Args:
        alone: no batch has the questions of two documents.
    """
    documents: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        documents.setdefault(number, []).append(index)
    batch: list[int] = []
    for asked in documents.values():
        if batch and (alone or len(batch) + len(asked) > rows):
            yield batch
            batch = []
        batch += asked
        while len(batch) > rows:
            yield batch[:rows]
            batch = batch[rows:]
    if batch:
        yield batch


def even_batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Places in batches of at most `rows`, of one length where many have it: no padding there."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        changes = bool(batch) and lengths[index] != lengths[batch[-1]]
        if len(batch) == rows or (changes and 2 * len(batch) >= rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def check_length(longest: int, limit: int, context_tokens: int, workload: str = "") -> None:
    """
    Raises:
        ValueError: where what is read and answered leaves the model's positions.
    """
    if longest > limit:
        raise ValueError(
            f"{workload and workload + ': '}context, questions and answers reach {longest} tokens, "
            f"the model has positions for {limit}: use a context of at most "
            f"{context_tokens - (longest - limit)} tokens"
        )
