"""A model as lm-evaluation-harness sees it, every score of which goes through the KV cache.

Its own HFLM scores a continuation in one forward without a cache, which would tell nothing about a
compressed one. Here the context is prefilled into the cache, which compresses it, and the
continuation is fed behind it one token at a time, as decoding does. What a prefill predicts itself
comes from attention over everything, so the last token of the context is fed like a decoded one
too: without that, a choice of one token (" A", " B") would not touch the compressed cache at all.
Generation is HFLM's, which calls `model.generate` and so uses the cache of the plan that is
attached; there the first token comes from the prefill, as for every user.

Needs the extra ``eval``; imported only by `harness`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.runner import document_batches
from kvcompress.evaluate.session import Session

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Scored = tuple[float, bool]


class CachedLM(HFLM):  # type: ignore[misc, unused-ignore]
    """See the module docstring. `model` must already serve the caches that `new_cache` makes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        new_cache: Callable[[], Cache],
        batch_rows: int,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_rows
        )
        self._new_cache = new_cache
        self._pad_id = Grader(tokenizer).pad_id

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the Hub."""
        return {}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[Scored]:
        """Sum of the log-probabilities of each continuation, and whether it is the greedy one.

        A context that several continuations share is prefilled once and its cache copied.
        """
        contexts = self._contexts(requests)
        longest_first = sorted(range(len(requests)), key=lambda i: (-len(contexts[i]), contexts[i]))
        numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
        found: dict[int, Scored] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="continuations") as bar:
            in_order = [numbers[contexts[i]] for i in longest_first]
            for places in document_batches(in_order, override_bs or self.batch_size):
                batch = [longest_first[place] for place in places]
                rows = [contexts[i] for i in batch]
                scores = self._score(rows, [requests[i][2] for i in batch])
                found |= dict(zip(batch, scores, strict=True))
                bar.update(len(batch))
        for index, (text, _, _) in enumerate(requests):
            if text is not None:  # a part of a longer text otherwise, which HFLM notes as a whole
                self.cache_hook.add_partial("loglikelihood", text, found[index])
        return [found[index] for index in range(len(requests))]

    def _contexts(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """The tokens before each continuation, cut from the left where both are too long."""
        contexts, cut = [], 0
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is not fed
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"{self.max_length} positions: leave this task out"
                )
            cut += len(context) > room
            contexts.append(tuple(context[-room:]))
        if cut:
            warnings.warn(
                f"{cut} of {len(requests)} contexts are longer than the model's {self.max_length} "
                "positions and were cut from the left",
                stacklevel=2,
            )
        return contexts

    def _score(
        self, contexts: list[tuple[int, ...]], continuations: list[list[int]]
    ) -> list[Scored]:
        read = [context[:-1] or context for context in contexts]
        distinct = list(dict.fromkeys(read))
        session = Session(self.model, self._new_cache(), self._pad_id)
        logits = session.prefill(distinct)
        rows = [distinct.index(context) for context in read]
        session.select(rows)
        held_back = [
            list(context[len(seen) :]) for context, seen in zip(contexts, read, strict=True)
        ]
        return continuation_scores(session, logits[rows], held_back, continuations)


def continuation_scores(
    session: Session,
    logits: Tensor,
    before: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> list[Scored]:
    """Feed each row token by token, and add up what the cache made of its continuation.

    Args:
        session: rows that are through are dropped from it, so it is of no use after.
        logits: ``[B, vocabulary]`` behind what each row holds.
        before: tokens of each row that are fed first and not scored.
    """
    fed = [[*first, *then] for first, then in zip(before, continuations, strict=True)]
    total, greedy = [0.0] * len(fed), [True] * len(fed)
    running = list(range(len(fed)))
    for step in range(max(map(len, fed))):
        token = torch.tensor([fed[row][step] for row in running], device=logits.device)
        likely = logits.float().log_softmax(-1)
        gained = likely.gather(1, token[:, None])[:, 0].tolist()
        best = (likely.argmax(-1) == token).tolist()
        for row, gain, is_best in zip(running, gained, best, strict=True):
            if step >= len(before[row]):
                total[row] += gain
                greedy[row] = greedy[row] and is_best
        going = [place for place, row in enumerate(running) if step + 1 < len(fed[row])]
        if not going:
            break
        if len(going) < len(running):
            session.select(going)
            running, token = [running[place] for place in going], token[going]
        logits = session.feed(token[:, None])[:, -1]
    return list(zip(total, greedy, strict=True))
