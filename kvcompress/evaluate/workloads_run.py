"""Running a workload: prompts compressed, questions asked on copies of the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError, PositionRangeWarning, UnsupportedModelError
from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.quality import document_batches
from kvcompress.evaluate.serving import cache_bytes, host_bytes, model_shape, serving
from kvcompress.evaluate.session import Dialogue, Session, converse
from kvcompress.evaluate.text import text_losses, window_logits
from kvcompress.evaluate.workloads import Question, WorkloadSuite
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.plan import Plan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams


def run_workload(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: WorkloadSuite,
    plan: Plan | None = None,
    params: KVParams | None = None,
    *,
    batch_rows: int = 16,
    reference: Tensor | None = None,
) -> WorkloadOutcome:
    """The model's answers, text losses and bytes under a plan.

    Args:
        plan: None for transformers' DynamicCache, the reference.
        params: constants of the key codes; None for centre 0 and scale 1.
        batch_rows: rows evaluated together; changes time and memory, not the result.
        reference: `reference_logits` of the same suite, which KL and flips are taken to; None
            computes them where they are needed. The reference itself takes its own as they are.

    Raises:
        PlanError: for a plan that was made for another model.
        UnsupportedModelError: where `beyond` needs positions that the model cannot number.
        ValueError: where documents and answers are longer than the model's positions.
    """
    grader = Grader(tokenizer)
    _check_length(model, suite, grader)
    if reference is None and plan is not None:
        reference = reference_logits(model, tokenizer, suite, batch_rows=batch_rows)
    with _running(model, suite, plan, params) as new_cache:
        runner = _Runner(model, suite, grader, new_cache, batch_rows)
        runner.ask()
        known = plan is None and reference is not None
        logits = reference if known else runner.text_logits()
    kl, perplexity, flips = _per_window(suite, logits, reference)
    seen = fmean(len(each.prompt) + len(each.generated) for each in suite.documents)
    return WorkloadOutcome(
        workload=suite.workload,
        target=None if plan is None else plan.target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        hits=tuple(fmean(rights) for rights in runner.right),
        output_tokens=tuple(runner.output_tokens),
        kl_nats=kl,
        perplexity=perplexity,
        flips=flips,
        kv_bytes=round(fmean(runner.held_bytes.values())),
        kv_bytes_bf16=model_shape(model).bf16_kv_bytes(round(seen), 1),
        host_bytes=round(fmean(runner.host_bytes.values())),
    )


def _per_window(
    suite: WorkloadSuite, logits: Tensor | None, reference: Tensor | None
) -> tuple[tuple[float, ...] | None, ...]:
    """KL, perplexity and flips, one value per window each."""
    if logits is None or suite.windows is None:
        return None, None, None
    found = text_losses(logits, reference, suite.windows[:, suite.context_tokens :])
    means = (found.kl.mean(1), found.loss.mean(1).exp(), found.flips.mean(1))
    return tuple(tuple(mean.tolist()) for mean in means)


def reference_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: WorkloadSuite,
    *,
    batch_rows: int = 16,
) -> Tensor | None:
    """``[W, C, vocabulary]`` of the text windows with the full cache; None without windows."""
    grader = Grader(tokenizer)
    with _running(model, suite, None, None) as new_cache:
        return _Runner(model, suite, grader, new_cache, batch_rows).text_logits()


def _check_length(model: PreTrainedModel, suite: WorkloadSuite, grader: Grader) -> None:
    """Within the model's positions, where the workload does not mean to leave them."""
    if suite.beyond:
        return
    limit = model_shape(model).max_position
    longest = 0 if suite.windows is None else suite.windows.shape[1]
    for sample in suite.samples:
        document = suite.documents[sample.document]
        for question in sample.questions:
            asked = len(grader.encode(question.text)) + grader.limit(question.answer)
            longest = max(longest, len(document.prompt) + len(document.generated) + asked)
    if longest > limit:
        raise ValueError(
            f"{suite.workload}: context, questions and answers reach {longest} tokens, the model "
            f"has positions for {limit}: use a context of at most "
            f"{suite.context_tokens - (longest - limit)} tokens"
        )


@contextmanager
def _running(
    model: PreTrainedModel, suite: WorkloadSuite, plan: Plan | None, params: KVParams | None
) -> Iterator[Callable[[], Cache]]:
    """`serving`; leaving the range of positions is no surprise where the workload is about it."""
    if not suite.beyond:
        with serving(model, plan, params) as new_cache:
            yield new_cache
        return
    with warnings.catch_warnings(), serving(model, plan, params) as new_cache:
        warnings.simplefilter("ignore", PositionRangeWarning)
        try:
            yield new_cache
        except (IndexError, RuntimeError) as error:
            if isinstance(error, KVCompressError):
                raise
            raise UnsupportedModelError(
                f"{type(model).__name__}: {suite.workload} needs {suite.context_tokens} positions "
                f"and the model fails there ({error}); leave this workload out"
            ) from error


class _Runner:
    """The passes of one plan over a suite.

    Attributes:
        right: per sample, for each question whether it was answered right.
        output_tokens: per sample.
        held_bytes, host_bytes: per document, of its row of the cache when the first question comes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        suite: WorkloadSuite,
        grader: Grader,
        new_cache: Callable[[], Cache],
        batch_rows: int,
    ) -> None:
        self.model, self.suite, self.grader = model, suite, grader
        self.new_cache, self.batch_rows = new_cache, batch_rows
        self.right: list[list[float]] = [[] for _ in suite.samples]
        self.output_tokens = [0] * len(suite.samples)
        self.held_bytes: dict[int, float] = {}
        self.host_bytes: dict[int, float] = {}

    def session(self) -> Session:
        return Session(self.model, self.new_cache(), self.grader.pad_id)

    def ask(self) -> None:
        """Every document once, its cache copied for each of its questions."""
        samples = self.suite.samples
        rows = [(i, question) for i, s in enumerate(samples) for question in s.questions]
        numbers = [samples[i].document for i, _ in rows]
        for batch in document_batches(numbers, self.batch_rows):
            documents = sorted({numbers[place] for place in batch})
            session, logits = self._read(documents)
            chosen = [documents.index(numbers[place]) for place in batch]
            session.select(chosen)
            self._answer(session, logits[chosen], [rows[place] for place in batch])

    def text_logits(self) -> Tensor | None:
        """Logits of every continuation behind its prefix."""
        if self.suite.windows is None:
            return None
        return window_logits(
            self.session,
            self.suite.windows,
            self.suite.context_tokens,
            feed_tokens=self.suite.feed_tokens,
            batch_rows=self.batch_rows,
            chunk_tokens=self.suite.chunk_tokens,
        )

    def _read(self, documents: Sequence[int]) -> tuple[Session, Tensor]:
        """Prefill, then force what is generated, token by token: that is how decoding stores it."""
        session = self.session()
        read = [self.suite.documents[number] for number in documents]
        logits = session.prefill([each.prompt for each in read], self.suite.chunk_tokens)
        forced = torch.tensor([each.generated for each in read], device=logits.device).long()
        for token in forced.split(1, dim=1):
            if token.numel():
                logits = session.feed(token)[:, -1]
        held = cache_bytes(session.cache) / len(documents)
        self.held_bytes |= dict.fromkeys(documents, held)
        self.host_bytes |= dict.fromkeys(documents, host_bytes(session.cache) / len(documents))
        return session, logits

    def _answer(
        self, session: Session, logits: Tensor, rows: Sequence[tuple[int, Question]]
    ) -> None:
        dialogues = [
            Dialogue([(self.grader.encode(question.text), self.grader.limit(question.answer))])
            for _, question in rows
        ]
        converse(session, logits, dialogues, self.grader.ends)
        for (sample, question), dialogue in zip(rows, dialogues, strict=True):
            (answer,) = dialogue.answers
            self.right[sample].append(float(self.grader.is_right(answer, question.answer)))
            self.output_tokens[sample] += len(answer)
