"""What a scorer is shown: the tokens of a chunk, and what one forward tells beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvcompress.evict.finish import finished, output_weight
from kvcompress.evict.scorers import Tokens
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.segments import Group
from kvcompress.runtime.store.state import LayerState


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention module tells in one forward, for scorers that need it.

    Attributes:
        module: the attention module itself, whose output projection some scorers read.
        hidden: ``[B, T, hidden]`` its input.
    """

    module: nn.Module | None = None
    hidden: Tensor | None = None


NOTHING = AttentionInputs()


def new_scores(
    state: LayerState, chunk: Chunk, attention_inputs: AttentionInputs = NOTHING
) -> dict[int, Tensor]:
    """The score that each new token of the chunk starts with, ``[B, Hg, T]`` per scored group."""
    return {
        number: state.settings.scorer.arrive(
            _tokens(state, group, chunk, chunk.held, attention_inputs)
        )
        for number, group in enumerate(state.groups)
        if group.recent_score is not None
    }


def finish_scores(
    state: LayerState,
    chunk: Chunk,
    scores: dict[int, Tensor],
    attention_inputs: AttentionInputs,
    leaving: Tensor,
) -> dict[int, Tensor]:
    """`scores` ``[B, Hg, P + T]`` of a prompt, or a part of it, whose tokens stand side by side.

    Args:
        leaving: ``[B, P + T]`` bool, tokens that are neither sinks nor recent.
    """
    scorer, pool_tokens = state.settings.scorer, state.settings.plan.pool_tokens
    done = {}
    for number, score in scores.items():
        tokens = _tokens(state, state.groups[number], chunk, 0, attention_inputs, ended=True)
        candidate = leaving[:, None].expand(score.shape)
        done[number] = finished(scorer, score, replace(tokens, candidate=candidate), pool_tokens)
    return done


def _tokens(
    state: LayerState,
    group: Group,
    chunk: Chunk,
    first: int,
    attention_inputs: AttentionInputs,
    ended: bool = False,
) -> Tokens:
    """The keys of `chunk` from the place `first` on, of a group's heads."""
    settings, index = state.settings, group.index
    scorer = settings.scorer
    heads = chunk.key.shape[1]
    # a group of all heads, in their order, needs no copies
    own = slice(None) if len(group.heads) == heads else index
    key, value = chunk.key[:, own, first:], chunk.value[:, own, first:]
    batch, count = key.shape[0], key.shape[2]
    rows = chunk.query.unflatten(1, (heads, -1))[:, own]
    newest = min(scorer.query_rows, chunk.length) if ended else 0
    valid = torch.ones(batch, count, dtype=torch.bool, device=key.device)
    weight = None
    if ended and "output_weight" in scorer.needs and attention_inputs.module is not None:
        weight = output_weight(attention_inputs.module, heads, rows.shape[2] * value.shape[-1])
    hidden = attention_inputs.hidden
    return Tokens(
        layer=settings.layer,
        head=index,
        key=key,
        value=value,
        position=torch.arange(count, device=key.device) + chunk.first + first,
        valid=valid if chunk.valid is None else chunk.valid[:, first:],
        query=rows[:, :, :, chunk.length - newest :],
        scaling=chunk.scaling,
        budget=frequent_tokens(state, group) if ended else None,
        output_weight=None if weight is None else weight[index],
        hidden=hidden if hidden is not None and hidden.shape[1] == count else None,
        rotation=settings.rotation,
        tensors=settings.trained(key.device),
    )


def frequent_tokens(state: LayerState, group: Group) -> Tensor:
    """``[B, Hg]`` tokens of the `frequent` budgets, before any rule changes them."""
    table = []
    for length in state.budget_length:
        plans = (state.settings.heads[h].frequent for h in group.heads)
        table.append([0 if budget is None else budget.resolve(length) for budget in plans])
    return torch.tensor(table, device=state.start.device)
