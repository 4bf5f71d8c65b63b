"""A workload on a cache of transformers' own, one row at a time.

`evaluate.workloads_run` reads documents together and takes rows of the cache for their questions.
transformers' QuantizedCache cannot: a selection of rows reaches its residual alone, and what is
padded or stands beside a row may change the constants of its codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.serving import model_shape, serving
from kvcompress.evaluate.session import Dialogue, Session, converse
from kvcompress.evaluate.text import text_losses, window_logits
from kvcompress.evaluate.workloads import Document, Question, WorkloadSuite
from kvcompress.evaluate.workloads_report import WorkloadOutcome

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


def run_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: WorkloadSuite,
    new_cache: Callable[[], Cache],
    held_bytes: Callable[[Cache], int],
    *,
    target: str,
    reference: Tensor | None,
) -> WorkloadOutcome:
    """Answers, text losses and bytes, each by the definition of `evaluate.run_workload`.

    Args:
        new_cache: makes an empty cache that grows as DynamicCache does: it replaces its tensors and
            never writes into them.
        held_bytes: of a cache with one row.
        target: what the outcome is called.
        reference: `reference_logits` of the same suite; None for a suite without windows.
    """
    grader = Grader(tokenizer)
    right: list[list[float]] = [[] for _ in suite.samples]
    output_tokens = [0] * len(suite.samples)
    sizes = []

    def session() -> Session:
        return Session(model, new_cache(), grader.pad_id)

    with serving(model, None, None):
        for number in sorted({sample.document for sample in suite.samples}):
            running = session()
            logits = _read(running, suite.documents[number], suite.chunk_tokens)
            sizes.append(held_bytes(running.cache))
            for i, sample in enumerate(suite.samples):
                for question in sample.questions if sample.document == number else ():
                    answer = _answer(_twin(running), logits, question, grader)
                    right[i].append(float(grader.is_right(answer, question.answer)))
                    output_tokens[i] += len(answer)
        losses = _text(session, suite, reference)
    seen = fmean(len(each.prompt) + len(each.generated) for each in suite.documents)
    outcome = WorkloadOutcome(
        workload=suite.workload,
        target=target,
        context_tokens=suite.context_tokens,
        seed=suite.seed,
        hits=tuple(map(fmean, right)),
        output_tokens=tuple(output_tokens),
        kv_bytes=round(fmean(sizes)),
        kv_bytes_bf16=model_shape(model).bf16_kv_bytes(round(seen), 1),
    )
    return outcome.model_copy(update=losses)


def _read(session: Session, document: Document, chunk_tokens: int | None) -> Tensor:
    """Logits ``[1, vocabulary]`` behind the prompt and what is forced after it, token by token."""
    logits = session.prefill([document.prompt], chunk_tokens)
    for token in document.generated:
        logits = session.feed(torch.tensor([[token]], device=logits.device))[:, -1]
    return logits


def _twin(session: Session) -> Session:
    """A session that goes on from here and leaves `session` as it is; tensors are shared."""
    cache = copy.copy(session.cache)
    cache.layers = [copy.copy(layer) for layer in session.cache.layers]
    twin = Session(session.model, cache, session.pad_id)
    twin.mask, twin.lengths = session.mask, session.lengths
    return twin


def _answer(session: Session, logits: Tensor, question: Question, grader: Grader) -> list[int]:
    dialogue = Dialogue([(grader.encode(question.text), grader.limit(question.answer))])
    converse(session, logits, [dialogue], grader.ends)
    (answer,) = dialogue.answers
    return answer


def _text(
    session: Callable[[], Session], suite: WorkloadSuite, reference: Tensor | None
) -> dict[str, object]:
    """KL, perplexity and flips per window, by the names that an outcome has for them."""
    if suite.windows is None or reference is None:
        return {}
    logits = window_logits(
        session,
        suite.windows,
        suite.context_tokens,
        feed_tokens=suite.feed_tokens,
        batch_rows=1,
        chunk_tokens=suite.chunk_tokens,
    )
    found = text_losses(logits, reference, suite.windows[:, suite.context_tokens :])
    return {
        "kl_nats": tuple(found.kl.mean(1).tolist()),
        "perplexity": tuple(found.loss.mean(1).exp().tolist()),
        "flips": tuple(found.flips.mean(1).tolist()),
    }
