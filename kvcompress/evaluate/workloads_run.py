"""Running a workload: prompts compressed, questions asked on copies of the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from kvcompress.errors import KVCompressError, PositionRangeWarning, UnsupportedModelError
from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.runner import Runner, check_length
from kvcompress.evaluate.serving import model_shape, serving
from kvcompress.evaluate.session import Dialogue
from kvcompress.evaluate.text import text_losses
from kvcompress.evaluate.workloads import WorkloadSuite
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.plan import Plan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams


@dataclass(frozen=True, slots=True)
class Rival:
    """A cache of transformers' own beside the reference; it is run one row at a time.

    Attributes:
        target: what the outcome is called.
        make: an empty cache, which grows as DynamicCache does: it replaces its tensors and never
            writes into them.
    """

    target: str
    make: Callable[[], Cache]


def run_workload(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: WorkloadSuite,
    plan: Plan | None = None,
    params: KVParams | None = None,
    *,
    batch_rows: int = 16,
    reference: Tensor | None = None,
    rival: Rival | None = None,
) -> WorkloadOutcome:
    """The model's answers, text losses and bytes under a plan.

    Args:
        plan: None for transformers' DynamicCache, the reference.
        params: constants of the key codes; None for centre 0 and scale 1.
        batch_rows: rows evaluated together; changes time and memory, not the result.
        reference: `reference_logits` of the same suite, which KL and flips are taken to; None
            computes them where they are needed. The reference itself takes its own as they are.
        rival: in the place of a plan.

    Raises:
        PlanError: for a plan that was made for another model.
        UnsupportedModelError: where `beyond` needs positions that the model cannot number.
        ValueError: where documents and answers are longer than the model's positions.
    """
    grader, shape = Grader(tokenizer), model_shape(model)
    if not suite.beyond:
        longest = _longest(suite, grader)
        check_length(longest, shape.max_position, suite.context_tokens, suite.workload)
    itself = plan is None and rival is None
    if reference is None and not itself:
        reference = reference_logits(model, tokenizer, suite, batch_rows=batch_rows)
    asked = [
        (sample.document, Dialogue([(grader.encode(q.text), grader.limit(q.answer))]))
        for sample in suite.samples
        for q in sample.questions
    ]
    with _running(model, suite, plan, params) as new_cache:
        make = new_cache if rival is None else rival.make
        apart = rival is not None
        runner = Runner(model, grader, make, batch_rows, suite.chunk_tokens, apart)
        runner.ask(suite.documents, asked)
        logits = reference
        if reference is None or not itself:
            logits = runner.text_logits(suite.windows, suite.context_tokens, suite.feed_tokens)
    kl, perplexity, flips = _per_window(suite, logits, reference)
    hits, output_tokens = _answers(suite, grader, [dialogue.answers[0] for _, dialogue in asked])
    seen = fmean(len(each.prompt) + len(each.generated) for each in suite.documents)
    target = None if plan is None else plan.target
    return WorkloadOutcome(
        workload=suite.workload,
        target=target if rival is None else rival.target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        hits=hits,
        output_tokens=output_tokens,
        kl_nats=kl,
        perplexity=perplexity,
        flips=flips,
        kv_bytes=runner.held_bytes,
        kv_bytes_bf16=shape.bf16_kv_bytes(round(seen), 1),
        host_bytes=runner.host_bytes,
    )


def reference_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: WorkloadSuite,
    *,
    batch_rows: int = 16,
) -> Tensor | None:
    """``[W, C, vocabulary]`` of the text windows with the full cache; None without windows."""
    with _running(model, suite, None, None) as new_cache:
        runner = Runner(model, Grader(tokenizer), new_cache, batch_rows, suite.chunk_tokens)
        return runner.text_logits(suite.windows, suite.context_tokens, suite.feed_tokens)


def _answers(
    suite: WorkloadSuite, grader: Grader, answers: list[list[int]]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Per sample the share of its questions that are answered right, and the tokens generated."""
    hits, output_tokens, given = [], [], iter(answers)
    for sample in suite.samples:
        own = [(next(given), question.answer) for question in sample.questions]
        hits.append(fmean(float(grader.is_right(tokens, answer)) for tokens, answer in own))
        output_tokens.append(sum(len(tokens) for tokens, _ in own))
    return tuple(hits), tuple(output_tokens)


def _per_window(
    suite: WorkloadSuite, logits: Tensor | None, reference: Tensor | None
) -> tuple[tuple[float, ...] | None, ...]:
    """KL, perplexity and flips, one value per window each."""
    if logits is None or suite.windows is None:
        return None, None, None
    found = text_losses(logits, reference, suite.windows[:, suite.context_tokens :])
    means = (found.kl.mean(1), found.loss.mean(1).exp(), found.flips.mean(1))
    return tuple(tuple(mean.tolist()) for mean in means)


def _longest(suite: WorkloadSuite, grader: Grader) -> int:
    """Tokens of the longest document with a question and its answer, or of a window."""
    longest = 0 if suite.windows is None else suite.windows.shape[1]
    for sample in suite.samples:
        document = suite.documents[sample.document]
        for question in sample.questions:
            asked = len(grader.encode(question.text)) + grader.limit(question.answer)
            longest = max(longest, len(document.prompt) + len(document.generated) + asked)
    return longest


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
