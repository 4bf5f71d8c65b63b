"""What a plan's rule decides for each row at the end of its prompt, from what the layer ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG, place_in_run
from kvcompress.evict.per_request import (
    KeepSizes,
    NewestRows,
    fastgen_choice,
    pooled_budgets,
    threshold_counts,
)
from kvcompress.plan import FastGenChoice, PooledBudget, Threshold
from kvcompress.runtime.prompt.attention_inputs import frequent_tokens
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import LayerState

_ABOVE_SCORES: Final = 2.0**39  # ranks of punctuation, local and special tokens lie above
DIAGNOSED_ROWS: Final = 64  # newest queries of a prompt that FastGen's recovery is measured on


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the heads of a group choose among: the tokens that they store, then the leaving ones.

    Attributes:
        row, head: ``[N]`` batch row, and head inside the group.
        position, rank: ``[N]``; a rank of −inf may not be kept.
        score: ``[N]``, or None in a group that keeps no scores.
        pinned: ``[N]`` bool, or None without protected spans.
        stored: how many of them are stored already.
        index: ``[N - stored]`` place of the leaving ones in the pool.
    """

    row: Tensor
    head: Tensor
    position: Tensor
    rank: Tensor
    score: Tensor | None
    pinned: Tensor | None
    stored: int
    index: Tensor


def granted_tokens(state: LayerState, candidates: list[Candidates]) -> list[list[int]] | None:
    """Tokens of each row's and head's `frequent` budget; None where no rule says so."""
    rule = state.settings.plan.per_request
    if not isinstance(rule, PooledBudget | Threshold):
        return None
    rank, budget = competing(state, candidates)
    if isinstance(rule, PooledBudget):
        return pooled_budgets(rank, budget, rule.floor)
    counts = threshold_counts(rank, rule.at_least, budget)
    return [[max(1, count) for count in row] for row in counts]


def competing(state: LayerState, candidates: list[Candidates]) -> tuple[Tensor, Tensor]:
    """Ranks ``[B, Hkv, N]`` of the tokens that compete by score, −inf elsewhere, and the `frequent`
    budgets ``[B, Hkv]`` of all heads of the layer."""
    heads = len(state.settings.heads)
    segments, ranks = [], []
    budget = torch.zeros(state.batch, heads, dtype=torch.int64, device=state.start.device)
    for group, found in zip(state.groups, candidates, strict=True):
        if not any(state.settings.heads[h].frequent for h in group.heads):
            continue
        budget[:, group.index] = frequent_tokens(state, group)
        segments.append(found.row * heads + group.index[found.head])
        ranks.append(found.rank.masked_fill(found.rank > _ABOVE_SCORES, -torch.inf))
    if not segments:
        return budget.new_zeros(state.batch, heads, 0).float(), budget
    segment, rank = torch.cat(segments), torch.cat(ranks)
    order = segment.argsort(stable=True)
    place = place_in_run(segment[order])
    width = int(place.max()) + 1 if len(place) else 0
    dense = rank.new_full((state.batch * heads, width), -torch.inf)
    dense[segment[order], place] = rank[order]
    return dense.unflatten(0, (state.batch, heads)), budget


def pooled_over_layers(
    states: list[LayerState], candidates: list[list[Candidates]]
) -> list[list[list[int]]]:
    """`granted_tokens` of every layer, whose heads all share their budgets."""
    found = [competing(state, own) for state, own in zip(states, candidates, strict=True)]
    rule = states[0].settings.plan.per_request
    assert isinstance(rule, PooledBudget)
    width = max(rank.shape[-1] for rank, _ in found)
    device = found[0][0].device
    wide = [
        torch.nn.functional.pad(rank, (0, width - rank.shape[-1]), value=-torch.inf).to(device)
        for rank, _ in found
    ]
    budget = torch.cat([own.to(device) for _, own in found], 1)
    granted = pooled_budgets(torch.cat(wide, 1), budget, rule.floor)
    result, low = [], 0
    for state in states:
        high = low + len(state.settings.heads)
        result.append([row[low:high] for row in granted])
        low = high
    return result


def chosen_keep_sets(state: LayerState, chunk: Chunk, scores: dict[int, Tensor]) -> list[list[int]]:
    """Place in FastGen's chain of each row's heads, from the newest queries of a first prompt.

    Differs from the paper: the scores that pick `frequent` tokens hold the votes of these queries
    too, as the paper's own do; the profile's static choice leaves them out.
    """
    settings, rule = state.settings, state.settings.plan.per_request
    assert isinstance(rule, FastGenChoice)
    batch, heads, count = chunk.key.shape[:3]
    rows = min(DIAGNOSED_ROWS, chunk.length)
    key_position = torch.arange(count, device=chunk.key.device) + chunk.first
    query_position = key_position[count - rows :]
    start = state.start[:, None, None].long()
    seen = key_position[None, None] <= query_position[None, :, None]
    inside = settings.sees(query_position[None, :, None], key_position[None, None], start)
    seen = seen if inside is None else seen & inside
    valid = torch.ones(batch, count, dtype=torch.bool, device=chunk.key.device)
    valid = valid if chunk.valid is None else chunk.valid
    logits = chunk.query[:, :, chunk.length - rows :].float().unflatten(1, (heads, -1))
    logits = logits @ chunk.key.float().mT[:, :, None] * chunk.scaling
    if chunk.softcap is not None:
        logits = torch.tanh(logits / chunk.softcap) * chunk.softcap
    shown = (seen & valid[:, None])[:, None, None]
    logits = logits.masked_fill(~shown, torch.finfo(torch.float32).min)
    flags = torch.zeros(batch, count, dtype=torch.int64, device=chunk.key.device)
    flags = flags if chunk.flags is None else chunk.flags.long()
    now = chunk.first + count - 1
    rank = logits.new_empty(batch, heads, count)
    votes = (now + 1 - key_position.clamp(min=state.first_vote)).expand(batch, 1, -1)
    for number, score in scores.items():
        rank[:, state.groups[number].index] = settings.scorer.rank(score, votes, now)
    budgets = [settings.heads[0].frequent, settings.heads[0].local]
    frequent, local = (
        torch.tensor([0 if b is None else b.resolve(n) for n in state.budget_length])
        for b in budgets
    )
    newest = NewestRows(
        logits.softmax(-1) * shown,
        query_position,
        key_position,
        valid,
        (flags & SPECIAL_FLAG) != 0,
        (flags & PUNCT_FLAG) != 0,
        rank,
    )
    sizes = KeepSizes(settings.sink_tokens, settings.recent_tokens, frequent, local)
    return fastgen_choice(newest, sizes, rule)
