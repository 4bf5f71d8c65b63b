"""Quality and bytes of a model under a plan, beside the same model with transformers' own cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.report import Answered, QualityReport, Recall, TextQuality, recall
from kvcompress.evaluate.session import Dialogue, Session, continuation_logits, converse
from kvcompress.evaluate.suite import Suite
from kvcompress.evaluate.tasks import Sample
from kvcompress.plan import ModelShape, Plan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams

_SPARE_TOKENS = 2  # an answer may run this far over the true one before it is cut off
_LOGIT_ROWS = 64  # rows of the vocabulary widened at a time; float64 keeps a tiny KL above 0


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
    with _serving(model, plan, params) as new_cache:
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
        kv_bytes_bf16=_shape(model).bf16_kv_bytes(suite.context_tokens, 1),
        weights_bytes=weights_bytes(model),
    )
    return Outcome(report, tuple(visible), tuple(hidden), logits)


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that `cache` holds; for transformers' caches their keys and values."""
    own = getattr(cache, "nbytes", None)
    if callable(own):
        return int(own())
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _shape(model: PreTrainedModel) -> ModelShape:
    from kvcompress.runtime.families import shape_of

    return shape_of(model.config, model.dtype)


def _check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite) -> None:
    shape = _shape(model)
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


@contextmanager
def _serving(
    model: PreTrainedModel, plan: Plan | None, params: KVParams | None
) -> Iterator[Callable[[], Cache]]:
    """A factory of caches that `model` serves inside the block; then it is as it was."""
    from kvcompress.runtime.hf import attach, attached, detach, new_cache

    before = attached(model)
    detach(model)
    was_training = model.training
    model.eval()
    try:
        if plan is None:
            from transformers import DynamicCache

            yield lambda: DynamicCache(config=model.config)
        else:
            attach(model, plan, params)
            yield lambda: new_cache(model)
    finally:
        detach(model)
        if before is not None:
            attach(model, *before)
        model.train(was_training)


class _Runner:
    """The passes of one row over the suite."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        suite: Suite,
        new_cache: Callable[[], Cache],
    ) -> None:
        self.model, self.tokenizer, self.suite, self.new_cache = model, tokenizer, suite, new_cache
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else (tokenizer.eos_token_id or 0)
        self._ends: dict[int, bool] = {}

    def session(self) -> Session:
        return Session(self.model, self.new_cache(), self.pad_id)

    def held_bytes(self) -> int:
        """KV bytes after one row of `context_tokens` tokens."""
        windows, length = self.suite.windows, self.suite.context_tokens
        if windows is not None:
            row = windows[0, :length].tolist()
        else:  # any text of the right length
            ids = self._encode(self.suite.samples[0].context, begin=True)
            row = (ids * (length // len(ids) + 1))[:length]
        session = self.session()
        session.prefill([row])
        return cache_bytes(session.cache)

    def ask_visible(self) -> list[Answered]:
        """Each question in the prompt that is prefilled."""
        samples = self.suite.samples
        prompts = [
            self._encode(sample.context, begin=True) + self._encode(sample.question)
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
        for batch in _document_batches(samples, self.suite.batch_rows):
            documents = sorted({samples[i].document for i in batch})
            context = {samples[i].document: samples[i].context for i in batch}
            session = self.session()
            logits = session.prefill([self._encode(context[d], begin=True) for d in documents])
            rows = [documents.index(samples[i].document) for i in batch]
            session.select(rows)
            found |= self._converse(session, logits[rows], batch, asked=False)
        return [found[i] for i in range(len(samples))]

    def text_logits(self) -> Tensor | None:
        """Logits of every continuation behind its prefix."""
        if self.suite.windows is None:
            return None
        parts = []
        for windows in self.suite.windows.split(self.suite.batch_rows):
            prefix = windows[:, : self.suite.context_tokens].tolist()
            rest = windows[:, self.suite.context_tokens :].to(self.model.device)
            session = self.session()
            logits = session.prefill(prefix)
            parts.append(continuation_logits(session, logits, rest, self.suite.feed_tokens).cpu())
        return torch.cat(parts)

    def _converse(
        self, session: Session, logits: Tensor, batch: Sequence[int], asked: bool
    ) -> dict[int, Answered]:
        samples = [self.suite.samples[i] for i in batch]
        dialogues = [Dialogue(self._turns(sample, asked)) for sample in samples]
        converse(session, logits, dialogues, self._ends_answer)
        scores = map(self._score, samples, dialogues)
        return dict(zip(batch, scores, strict=True))

    def _turns(self, sample: Sample, asked: bool) -> list[tuple[list[int], int]]:
        newline = self._encode("\n")
        first = [] if asked else self._encode(sample.question)
        turns = [(first, self._limit(sample.answer))]
        for question, answer in sample.follow_ups:
            turns.append(([*newline, *self._encode(question)], self._limit(answer)))
        return turns

    def _score(self, sample: Sample, dialogue: Dialogue) -> Answered:
        expected = (sample.answer, *(answer for _, answer in sample.follow_ups))
        right = sum(
            str(self.tokenizer.decode(tokens)).split("\n")[0].strip() == answer.strip()
            for tokens, answer in zip(dialogue.answers, expected, strict=True)
        )
        tokens = sum(map(len, dialogue.answers))
        return Answered(right == len(expected), right, len(expected), tokens)

    def _ends_answer(self, token: int) -> bool:
        if token not in self._ends:
            piece = self.tokenizer.decode([token])
            self._ends[token] = (
                "." in piece or "\n" in piece or token == self.tokenizer.eos_token_id
            )
        return self._ends[token]

    def _limit(self, answer: str) -> int:
        return len(self._encode(answer)) + _SPARE_TOKENS

    def _encode(self, text: str, begin: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=begin, verbose=False)["input_ids"]


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


def _document_batches(samples: Sequence[Sample], rows: int) -> Iterator[list[int]]:
    """Sample numbers in batches of at most `rows`; only a document larger than that is split."""
    documents: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        documents.setdefault(sample.document, []).append(index)
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
    """Perplexity, and KL and flips to `reference`; in slices, so that a large vocabulary fits."""
    if logits is None or suite.windows is None:
        return None
    target = suite.windows[:, suite.context_tokens :].reshape(-1)
    rows = logits.flatten(0, 1)
    other = rows if reference is None else reference.flatten(0, 1)
    loss = kl = flips = 0.0
    for part in torch.arange(len(target)).split(_LOGIT_ROWS):
        ours, theirs = rows[part].double().log_softmax(-1), other[part].double().log_softmax(-1)
        loss -= ours.gather(1, target[part, None]).sum().item()
        kl += (theirs.exp() * (theirs - ours)).sum().item()
        flips += (ours.argmax(-1) != theirs.argmax(-1)).sum().item()
    count = len(target)
    return TextQuality(
        tokens=count, perplexity=math.exp(loss / count), kl_nats=kl / count, flips=flips / count
    )
