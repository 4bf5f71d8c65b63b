"""Quality and bytes of a model under a plan, beside the same model with transformers' own cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.report import Answered, QualityReport, Recall, TextQuality, recall
from kvcompress.evaluate.runner import Document, Runner, check_length, even_batches
from kvcompress.evaluate.serving import (
    cache_bytes,
    model_shape,
    serving,
    wider_bytes,
    wider_weight_bytes,
)
from kvcompress.evaluate.session import Dialogue
from kvcompress.evaluate.suite import Suite
from kvcompress.evaluate.text import text_losses
from kvcompress.plan import Plan
from kvcompress.tasks.documents import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    grader, shape = Grader(tokenizer), model_shape(model)
    longest = 0 if suite.windows is None else suite.windows.shape[1]
    longest = max([longest, *(_length(grader, sample) for sample in suite.samples)])
    check_length(longest, shape.max_position, suite.context_tokens)
    with serving(model, plan, params) as new_cache:
        runner = Runner(model, grader, new_cache, suite.batch_rows)
        held_bytes = _held_bytes(runner, suite)
        visible, hidden = _visible(runner, suite), _hidden(runner, suite)
        logits = runner.text_logits(suite.windows, suite.context_tokens, suite.feed_tokens)
    report = QualityReport(
        name=name or ("reference" if plan is None else plan.target),
        target=None if plan is None else plan.target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        visible=_recall(suite, visible, reference.visible if reference else None),
        hidden=_recall(suite, hidden, reference.hidden if reference else None),
        text=_text_quality(suite, logits, reference.logits if reference else None),
        kv_bytes=held_bytes - wider_bytes(model, plan, suite.context_tokens),
        kv_bytes_accounted=None if plan is None else kv_bytes(plan, suite.context_tokens, 1),
        kv_bytes_bf16=shape.bf16_kv_bytes(suite.context_tokens, 1),
        weights_bytes=weights_bytes(model) - wider_weight_bytes(model),
        kl_predicted=None if plan is None else plan.predicted_loss,
    )
    return Outcome(report, visible, hidden, logits)


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _length(grader: Grader, sample: Sample) -> int:
    turns = ((sample.question, sample.answer), *sample.follow_ups)
    text = "\n".join(question + answer for question, answer in turns)
    return len(grader.encode(sample.context + text, begin=True)) + 2 * len(turns)


def _held_bytes(runner: Runner, suite: Suite) -> int:
    """KV bytes after one row of `context_tokens` tokens."""
    length = suite.context_tokens
    if suite.windows is not None:
        row = suite.windows[0, :length].tolist()
    else:  # any text of the right length
        ids = runner.grader.encode(suite.samples[0].context, begin=True)
        row = (ids * (length // len(ids) + 1))[:length]
    session = runner.session()
    session.prefill([row])
    return cache_bytes(session.cache)


def _visible(runner: Runner, suite: Suite) -> tuple[Answered, ...]:
    """Each question in the prompt that is prefilled."""
    encode = runner.grader.encode
    prompts = [
        Document((*encode(sample.context, begin=True), *encode(sample.question)))
        for sample in suite.samples
    ]
    dialogues = [Dialogue(_turns(runner.grader, s, asked=True)) for s in suite.samples]
    batches = even_batches([len(each.prompt) for each in prompts], runner.batch_rows)
    runner.ask(prompts, list(enumerate(dialogues)), batches)
    return _scored(runner.grader, suite.samples, dialogues)


def _hidden(runner: Runner, suite: Suite) -> tuple[Answered, ...]:
    """Each document prefilled once, its cache then copied for every question to it."""
    texts = {sample.document: sample.context for sample in suite.samples}
    places = {number: place for place, number in enumerate(texts)}
    documents = [Document(tuple(runner.grader.encode(text, begin=True))) for text in texts.values()]
    dialogues = [Dialogue(_turns(runner.grader, s, asked=False)) for s in suite.samples]
    numbers = [places[sample.document] for sample in suite.samples]
    runner.ask(documents, list(zip(numbers, dialogues, strict=True)))
    return _scored(runner.grader, suite.samples, dialogues)


def _turns(grader: Grader, sample: Sample, asked: bool) -> list[tuple[list[int], int]]:
    newline = grader.encode("\n")
    first = [] if asked else grader.encode(sample.question)
    turns = [(first, grader.limit(sample.answer))]
    for question, answer in sample.follow_ups:
        turns.append(([*newline, *grader.encode(question)], grader.limit(answer)))
    return turns


def _scored(
    grader: Grader, samples: Sequence[Sample], dialogues: Sequence[Dialogue]
) -> tuple[Answered, ...]:
    found = []
    for sample, dialogue in zip(samples, dialogues, strict=True):
        expected = (sample.answer, *(answer for _, answer in sample.follow_ups))
        pairs = zip(dialogue.answers, expected, strict=True)
        right = sum(grader.is_right(tokens, answer) for tokens, answer in pairs)
        tokens = sum(map(len, dialogue.answers))
        found.append(Answered(right == len(expected), right, len(expected), tokens))
    return tuple(found)


def _recall(
    suite: Suite, answered: Sequence[Answered], reference: Sequence[Answered] | None
) -> Recall | None:
    return recall(suite.samples, answered, reference, suite.seed) if suite.samples else None


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
