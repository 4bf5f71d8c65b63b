"""KVzip's scores of a context, from one forward of [context ; request ; context].

The rows behind the context vote on its keys, as KVzip's scorer says. Queries are taken in chunks,
so that no square matrix of attention exists. No cache is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.evict.scorers import QueryRows, Scorer, scorer
from kvcompress.plan import ModelShape
from kvcompress.profile.collect import attend, forward, inputs_of, tokens_of
from kvcompress.profile.hf import LayerInput, attention_through
from kvcompress.runtime.hf.announce import attention_modules


@dataclass(frozen=True, slots=True)
class ScoredContext:
    """One layer's context after it was repeated.

    Attributes:
        hidden: ``[S, hidden]`` float32 input of the attention module.
        score: ``[Hkv, S]`` float32.
        seen: ``[S]`` bool: whether any row of the repetition could see the token.
    """

    layer: int
    hidden: Tensor
    score: Tensor
    seen: Tensor


def score_context(
    model: PreTrainedModel,
    shape: ModelShape,
    context: list[int],
    request: tuple[int, ...],
    name: str,
    observer: Callable[[ScoredContext], None],
) -> None:
    """Call `observer` for every layer.

    Args:
        context: token ids; twice their number and the request must fit the model's positions.
        request: ids between the context and its repetition.
        name: ``kvzip`` or ``kvzip_plus``.
    """
    length = len(context)
    chosen = scorer(name)

    def run(given: LayerInput) -> Tensor:
        hidden = inputs.pop(given.module)
        votes = _Repetition(chosen, length, hidden.norm(dim=-1))
        out = attend(given, votes)
        tokens = tokens_of(given, chosen, length)
        score = chosen.finish(votes.score[None], tokens)[0]
        seen = torch.ones(length, dtype=torch.bool, device=hidden.device)
        if given.softmax.window is not None:
            seen = tokens.position > length - given.softmax.window
        observer(ScoredContext(given.layer, hidden[:length], score, seen))
        return out

    with inputs_of(attention_modules(model)) as inputs, attention_through(model, shape, run):
        forward(model, [*context, *request, *context])


def head_scores(
    model: PreTrainedModel,
    shape: ModelShape,
    prompts: Sequence[list[int]],
    opening_tokens: int,
    sink_tokens: int,
    step: Callable[[int], None] = lambda count: None,
) -> tuple[tuple[float, ...], ...]:
    """``[layer][KV head]`` largest KVzip score of any token, the mean over halves of `prompts`.

    A token's score is the largest attention that a repetition of its text pays to it, so a head's
    says whether it ever looks far back for what it repeats. Sinks, the opening and the newer half
    of a context, which a window may reach, are left out.

    Args:
        step: told of every finished prompt.

    Source: KVzip (arXiv 2505.23416), the scores of heads, independent of the context.
    """
    found: list[Tensor] = []

    def note(context: ScoredContext) -> None:
        seen = context.seen.clone()
        seen[: max(opening_tokens, sink_tokens)] = False
        seen[len(seen) // 2 :] = False
        found.append(context.score[:, seen].amax(-1) if seen.any() else context.score[:, 0] * 0)

    for ids in prompts:
        for context in contexts_of(ids, opening_tokens):
            score_context(model, shape, context, (), "kvzip", note)
        step(1)
    table = torch.stack(found).unflatten(0, (-1, shape.layers)).mean(0)
    return tuple(tuple(float(f"{x:.6g}") for x in layer) for layer in table.tolist())


def contexts_of(ids: list[int], opening_tokens: int) -> list[list[int]]:
    """Both halves of a prompt, each behind the opening and short enough to be read twice."""
    opening, text = ids[:opening_tokens], ids[opening_tokens:]
    size = len(ids) // 2 - opening_tokens
    return [opening + text[low : low + size] for low in (0, size)]


class _Repetition:
    """The votes of the rows behind a context of `length` tokens, for its keys.

    Attributes:
        score: ``[Hkv, S]``.
    """

    def __init__(self, chosen: Scorer, length: int, norm: Tensor) -> None:
        self.scorer, self.length, self.norm = chosen, length, norm
        self.snapshots_at = (length,)
        self.score = norm.new_zeros(1, length)

    def add(self, probability: Tensor, first_row: int) -> None:
        if first_row < self.length:
            return
        heads, groups, count, _ = probability.shape
        row = torch.arange(first_row, first_row + count, device=probability.device)
        weight = torch.full_like(self.norm[row], 1 / groups)
        rows = QueryRows(
            weight.expand(heads, -1), row.expand(heads, -1), row, self.norm[row].expand(heads, -1)
        )
        votes = self.scorer.collect(probability[..., : self.length], rows)
        self.score = self.scorer.merge(self.score, votes)
