"""Quality and bytes of a model under a plan, beside the same model with transformers' own cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.report import Answered, QualityReport, Recall, TextQuality, recall
from kvcompress.evaluate.serving import cache_bytes, model_shape, serving
from kvcompress.evaluate.session import Dialogue, Session, converse
from kvcompress.evaluate.suite import Suite
from kvcompress.evaluate.text import text_losses, window_logits
from kvcompress.plan import Plan
from kvcompress.tasks.documents import Sample

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams


@dataclass(frozen=True, slots=True)
class Outcome:
    """A report with what later reports are compared to.

    Attributes:
        visible, hidden: one entry per sample of the suite.
        logits: ``[W, C, vocabulary]`` in the model's dtype, of every text window's continuation.
    """

    report: QualityReport
    visible: tuple[Answered, ...]
    hidden: tuple[Answered, ...]
    logits: Tensor | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan | None,
    params: KVParams | None,
    suite: Suite,
) -> QualityReport:
    """Report of `model` under `plan`, compared to its own full cache; None gives the latter."""
    reference = measure(model, tokenizer, suite)
    if plan is None:
        return reference.report
    return measure(model, tokenizer, suite, plan, params, reference=reference).report


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    plan: Plan | None = None,
    params: KVParams | None = None,
    *,
    reference: Outcome | None = None,
    name: str | None = None,
) -> Outcome:
    """One row of a comparison.

    Args:
        plan: None for transformers' DynamicCache.
        params: constants of the key codes; None for centre 0 and scale 1.
        reference: outcome of the same suite that differences and KL are taken to.

    Raises:
        PlanError: for a plan that was made for another model.
        ValueError: where context and answers are longer than the model's positions.
    """
    _check_length(model, tokenizer, suite)
    with serving(model, plan, params) as new_cache:
        runner = _Runner(model, tokenizer, suite, new_cache)
        held_bytes = runner.held_bytes()
        visible = runner.ask_visible()
        hidden = runner.ask_hidden()
        logits = runner.text_logits()
    report = QualityReport(
        name=name or ("reference" if plan is None else plan.target),
        target=None if plan is None else plan.target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        visible=_recall(suite, visible, reference.visible if reference else None),
        hidden=_recall(suite, hidden, reference.hidden if reference else None),
        text=_text_quality(suite, logits, reference.logits if reference else None),
        kv_bytes=held_bytes,
        kv_bytes_accounted=None if plan is None else kv_bytes(plan, suite.context_tokens, 1),
        kv_bytes_bf16=model_shape(model).bf16_kv_bytes(suite.context_tokens, 1),
        weights_bytes=weights_bytes(model),
        kl_predicted=None if plan is None else plan.predicted_loss,
    )
    return Outcome(report, tuple(visible), tuple(hidden), logits)


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite) -> None:
    shape = model_shape(model)
    windows = 0 if suite.windows is None else suite.windows.shape[1]
    longest = max([windows, *(_length(tokenizer, sample) for sample in suite.samples)])
    if longest > shape.max_position:
        raise ValueError(
            f"context, questions and answers reach {longest} tokens, the model has positions for "
            f"{shape.max_position}: use a context of at most "
            f"{suite.context_tokens - (longest - shape.max_position)} tokens"
        )


def _length(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> int:
    turns = ((sample.question, sample.answer), *sample.follow_ups)
    text = "\n".join(question + answer for question, answer in turns)
    return len(tokenizer(sample.context + text, verbose=False)["input_ids"]) + 2 * len(turns)


class _Runner:
    """The passes of one row over the suite."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        suite: Suite,
        new_cache: Callable[[], Cache],
    ) -> None:
        self.model, self.suite, self.new_cache = model, suite, new_cache
        self.grader = Grader(tokenizer)

    def session(self) -> Session:
        return Session(self.model, self.new_cache(), self.grader.pad_id)

    def held_bytes(self) -> int:
        """KV bytes after one row of `context_tokens` tokens."""
        windows, length = self.suite.windows, self.suite.context_tokens
        if windows is not None:
            row = windows[0, :length].tolist()
        else:  # any text of the right length
            ids = self.grader.encode(self.suite.samples[0].context, begin=True)
            row = (ids * (length // len(ids) + 1))[:length]
        session = self.session()
        session.prefill([row])
        return cache_bytes(session.cache)

    def ask_visible(self) -> list[Answered]:
        """Each question in the prompt that is prefilled."""
        samples = self.suite.samples
        prompts = [
            self.grader.encode(sample.context, begin=True) + self.grader.encode(sample.question)
            for sample in samples
        ]
        found: dict[int, Answered] = {}
        for batch in _even_batches([len(prompt) for prompt in prompts], self.suite.batch_rows):
            session = self.session()
            logits = session.prefill([prompts[i] for i in batch])
            found |= self._converse(session, logits, batch, asked=True)
        return [found[i] for i in range(len(samples))]

    def ask_hidden(self) -> list[Answered]:
        """Each document prefilled once, its cache then copied for every question to it."""
        samples = self.suite.samples
        found: dict[int, Answered] = {}
        numbers = [sample.document for sample in samples]
        for batch in document_batches(numbers, self.suite.batch_rows):
            documents = sorted({samples[i].document for i in batch})
            context = {samples[i].document: samples[i].context for i in batch}
            session = self.session()
            logits = session.prefill(
                [self.grader.encode(context[d], begin=True) for d in documents]
            )
            rows = [documents.index(samples[i].document) for i in batch]
            session.select(rows)
            found |= self._converse(session, logits[rows], batch, asked=False)
        return [found[i] for i in range(len(samples))]

    def text_logits(self) -> Tensor | None:
        """Logits of every continuation behind its prefix."""
        if self.suite.windows is None:
            return None
        return window_logits(
            self.session,
            self.suite.windows,
            self.suite.context_tokens,
            feed_tokens=self.suite.feed_tokens,
            batch_rows=self.suite.batch_rows,
        )

    def _converse(
        self, session: Session, logits: Tensor, batch: Sequence[int], asked: bool
    ) -> dict[int, Answered]:
        samples = [self.suite.samples[i] for i in batch]
        dialogues = [Dialogue(self._turns(sample, asked)) for sample in samples]
        converse(session, logits, dialogues, self.grader.ends)
        scores = map(self._score, samples, dialogues)
        return dict(zip(batch, scores, strict=True))

    def _turns(self, sample: Sample, asked: bool) -> list[tuple[list[int], int]]:
        newline = self.grader.encode("\n")
        first = [] if asked else self.grader.encode(sample.question)
        turns = [(first, self.grader.limit(sample.answer))]
        for question, answer in sample.follow_ups:
            turns.append(([*newline, *self.grader.encode(question)], self.grader.limit(answer)))
        return turns

    def _score(self, sample: Sample, dialogue: Dialogue) -> Answered:
        expected = (sample.answer, *(answer for _, answer in sample.follow_ups))
        right = sum(
            self.grader.is_right(tokens, answer)
            for tokens, answer in zip(dialogue.answers, expected, strict=True)
        )
        tokens = sum(map(len, dialogue.answers))
        return Answered(right == len(expected), right, len(expected), tokens)


def _even_batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most `rows`, of one length where many have it: no padding there."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        changes = bool(batch) and lengths[index] != lengths[batch[-1]]
        if len(batch) == rows or (changes and 2 * len(batch) >= rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def document_batches(numbers: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Places in `numbers`, the document of each question, in batches of at most `rows`.

    The questions of a document stay together, unless they are more than `rows`.
    """
    documents: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        documents.setdefault(number, []).append(index)
    batch: list[int] = []
    for asked in documents.values():
        if batch and len(batch) + len(asked) > rows:
            yield batch
            batch = []
        batch += asked
        while len(batch) > rows:
            yield batch[:rows]
            batch = batch[rows:]
    if batch:
        yield batch


def _recall(
    suite: Suite, answered: Sequence[Answered], reference: Sequence[Answered] | None
) -> Recall | None:
    if not suite.samples:
        return None
    return recall(suite.samples, answered, reference, suite.seed)


def _text_quality(
    suite: Suite, logits: Tensor | None, reference: Tensor | None
) -> TextQuality | None:
    """Perplexity, and KL and flips to `reference`."""
    if logits is None or suite.windows is None:
        return None
    target = suite.windows[:, suite.context_tokens :]
    found = text_losses(logits, reference, target)
    return TextQuality(
        tokens=target.numel(),
        perplexity=math.exp(found.loss.mean().item()),
        kl_nats=found.kl.mean().item(),
        flips=found.flips.mean().item(),
    )
