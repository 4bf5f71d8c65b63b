"""KVzip's scores of a context, collected from one forward of [context ; request ; context].

Rows behind the context vote on its keys, exactly as the scorer of that name says; queries are taken
in chunks, so that no square matrix of attention exists. Nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.evict.finish import output_weight
from kvcompress.evict.scorers import Rows, Tokens, scorer
from kvcompress.plan import ModelShape
from kvcompress.profile.collect import Softmax, attend, forward, grouped, inputs_of_attention
from kvcompress.profile.hf import attention_through


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
    model: Any,
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

    def run(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        softmax = Softmax(scaling, softcap, shape.sliding_windows[layer])
        query, key, value = grouped(q, k), k.float(), v.float()
        hidden = inputs.pop(module)
        votes = _Repetition(name, length, hidden.norm(dim=-1))
        out = attend(query, key, value, softmax, votes)
        tokens = _tokens(module, layer, query, key, value, length, scaling)
        score = scorer(name).finish(votes.score[None], tokens)[0]
        position = torch.arange(length, device=key.device)
        seen = torch.ones_like(position, dtype=torch.bool)
        if softmax.window is not None:
            seen = position > length - softmax.window
        observer(ScoredContext(layer, hidden[:length], score, seen))
        return out.flatten(0, 1)

    with inputs_of_attention(model, True) as inputs, attention_through(model, run):
        forward(model, [*context, *request, *context])


def head_scores(
    model: Any,
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

    def __init__(self, name: str, length: int, norm: Tensor) -> None:
        self.scorer, self.length, self.norm = scorer(name), length, norm
        self.snapshots_at = (length,)
        self.score = norm.new_zeros(1, length)

    def add(self, probability: Tensor, first_row: int) -> None:
        if first_row < self.length:
            return
        heads, groups, count, _ = probability.shape
        row = torch.arange(first_row, first_row + count, device=probability.device)
        weight = torch.full_like(self.norm[row], 1 / groups)
        rows = Rows(
            weight.expand(heads, -1), row.expand(heads, -1), row, self.norm[row].expand(heads, -1)
        )
        votes = self.scorer.collect(probability[..., : self.length], rows)
        self.score = self.scorer.merge(self.score, votes)


def _tokens(
    module: nn.Module,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    scaling: float,
) -> Tokens:
    heads, groups = query.shape[:2]
    return Tokens(
        layer=layer,
        head=torch.arange(heads, device=key.device),
        key=key[None, :, :length],
        value=value[None, :, :length],
        position=torch.arange(length, device=key.device),
        valid=torch.ones(1, length, dtype=torch.bool, device=key.device),
        query=query[None, :, :, :0],
        scaling=scaling,
        output_weight=output_weight(module, heads, groups * value.shape[-1]),
    )
