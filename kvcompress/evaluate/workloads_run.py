"""Running a workload: prompts compressed, questions asked on copies of the cache."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError, PositionRangeWarning, UnsupportedModelError
from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.drawing import WorkloadSample, WorkloadSuite
from kvcompress.evaluate.runner import Runner, check_length
from kvcompress.evaluate.serving import model_shape, serving, wider_bytes
from kvcompress.evaluate.session import Dialogue, Session, Turn
from kvcompress.evaluate.text import text_losses
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
    score = _fed if suite.fed else _generated
    with _running(model, suite, plan, params) as new_cache:
        make = new_cache if rival is None else rival.make
        apart = rival is not None
        rows = max([batch_rows, *_questions_each(suite).values()]) if suite.fed else batch_rows
        runner = Runner(model, grader, make, rows, suite.chunk_tokens, apart)
        scores = score(runner, suite)
        logits = reference
        if reference is None or not itself or not suite.documents:  # the bytes are a window's, then
            logits = runner.text_logits(suite.windows, suite.context_tokens, suite.feed_tokens)
    kl, perplexity, flips = _per_window(suite, logits, reference)
    if not suite.samples:
        scores = _of_windows(suite, perplexity, flips)
    lengths = [len(each.prompt) + len(each.generated) for each in suite.documents]
    seen = round(fmean(lengths or [suite.context_tokens]))
    target = None if plan is None else plan.target
    return WorkloadOutcome(
        workload=suite.workload,
        target=target if rival is None else rival.target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        hits=scores.hits,
        output_tokens=scores.tokens,
        answer_nats=scores.nats,
        kl_nats=kl,
        perplexity=perplexity,
        flips=flips,
        kv_bytes=runner.held_bytes - (0 if apart else wider_bytes(model, plan, seen)),
        kv_bytes_bf16=shape.bf16_kv_bytes(seen, 1),
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


@torch.inference_mode()
def own_continuation(model: PreTrainedModel, prefixes: Tensor, tokens: int) -> Tensor:
    """The likeliest ``[W, tokens]`` behind `prefixes` ``[W, T]``, one window at a time, with
    transformers' own cache; an end of the text ends nothing."""
    found = []
    with serving(model, None, None) as new_cache:
        for row in prefixes.to(model.device):
            session = Session(model, new_cache(), pad_id=0)
            step = session.prefill([row.tolist()]).argmax(-1, keepdim=True)
            steps = [step]
            while len(steps) < tokens:
                step = session.feed(step)[:, -1].argmax(-1, keepdim=True)
                steps.append(step)
            found.append(torch.cat(steps, dim=1).cpu())
    return torch.cat(found)


class _Scores(NamedTuple):
    """See `WorkloadOutcome`."""

    hits: tuple[float, ...]
    tokens: tuple[int, ...]
    nats: tuple[float, ...] | None = None


def _generated(runner: Runner, suite: WorkloadSuite) -> _Scores:
    """The model answers by itself."""
    grader = runner.grader
    asked = [
        (sample.document, Dialogue([(grader.encode(q.text), grader.limit(q.answer))]))
        for sample in suite.samples
        for q in sample.questions
    ]
    runner.ask(suite.documents, asked)
    given = iter([dialogue.answers[0] for _, dialogue in asked])
    hits, output_tokens = [], []
    for sample in suite.samples:
        own = [(next(given), question.answer) for question in sample.questions]
        hits.append(fmean(float(grader.is_right(tokens, answer)) for tokens, answer in own))
        output_tokens.append(sum(len(tokens) for tokens, _ in own))
    return _Scores(tuple(hits), tuple(output_tokens))


def _fed(runner: Runner, suite: WorkloadSuite) -> _Scores:
    """The true answers are fed; each (text, answer) of a question counts as one."""
    turns = [turns_of(sample, runner.grader) for sample in suite.samples]
    asked = [(s.document, each) for s, each in zip(suite.samples, turns, strict=True)]
    hits, tokens, nats = [], [], []
    for row, logits in zip(turns, runner.feed_answers(suite.documents, asked), strict=True):
        true = torch.tensor([token for _, answer in row for token in answer])
        right = iter((logits.argmax(-1) == true).tolist())
        hits.append(fmean(all([next(right) for _ in answer]) for _, answer in row))
        tokens.append(len(true))
        nats.append(-logits.double().log_softmax(-1).gather(1, true[:, None]).mean().item())
    return _Scores(tuple(hits), tuple(tokens), tuple(nats))


def turns_of(sample: WorkloadSample, grader: Grader) -> list[Turn]:
    """(forced tokens, tokens of the true answer) of all that is asked as one."""
    pairs = [pair for q in sample.questions for pair in ((q.text, q.answer), *q.more)]
    return [(grader.encode(text), grader.encode(answer)) for text, answer in pairs]


def _of_windows(
    suite: WorkloadSuite,
    perplexity: tuple[float, ...] | None,
    flips: tuple[float, ...] | None,
) -> _Scores:
    """Where there is text alone.

    Raises:
        ValueError: where there is none of it either.
    """
    if perplexity is None or flips is None or suite.windows is None:
        raise ValueError(f"{suite.workload}: is about windows of text: ask for at least one")
    tokens = suite.windows.shape[1] - suite.context_tokens
    nats = tuple(map(math.log, perplexity))
    return _Scores(tuple(1 - share for share in flips), (tokens,) * len(nats), nats)


def _questions_each(suite: WorkloadSuite) -> Counter[int]:
    return Counter(sample.document for sample in suite.samples)


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
        turns = turns_of(sample, grader) if suite.fed else []
        asked = [sum(len(text) + len(answer) for text, answer in turns)]
        if not suite.fed:
            questions = sample.questions
            asked = [len(grader.encode(q.text)) + grader.limit(q.answer) for q in questions]
        longest = max(longest, len(document.prompt) + len(document.generated) + max(asked))
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
