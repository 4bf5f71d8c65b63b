"""Random prompts of one layer, and what the runtime would do with a scorer on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.evict.finish import finished
from kvcompress.evict.score_queries import pair_weight
from kvcompress.evict.scorers import QueryRows, Scorer, Tokens
from kvcompress.quant.keystats import Rotation

SCALING = 0.4
HIDDEN = 6


@dataclass
class Prompt:
    """Queries ``[B, H, G, T, D]``, keys and values ``[B, H, T, D]``; row b starts with pads."""

    query: Tensor
    key: Tensor
    value: Tensor
    pads: tuple[int, ...]
    output_weight: Tensor
    rotation: Rotation | None = None
    sharp: float = 1.0
    budget: Tensor | None = None
    candidate: Tensor | None = None
    first_position: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.key.shape[2]

    @property
    def valid(self) -> Tensor:
        return torch.arange(self.length) >= torch.tensor(self.pads)[:, None]

    def attention(self) -> Tensor:
        """``[B, H, G, T, T]`` causal, padding masked."""
        logits = self.query @ self.key.unsqueeze(2).mT * (SCALING * self.sharp)
        seen = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        seen = (seen & self.valid[:, None])[:, None, None]
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen

    def tokens(self, query_rows: int = 0) -> Tokens:
        heads = self.key.shape[1]
        return Tokens(
            layer=0,
            head=torch.arange(heads),
            key=self.key,
            value=self.value,
            position=torch.arange(self.length) + self.first_position,
            valid=self.valid,
            query=self.query[:, :, :, self.length - min(query_rows, self.length) :],
            scaling=SCALING,
            budget=self.budget,
            candidate=self.candidate,
            output_weight=self.output_weight,
            hidden=torch.zeros(len(self.pads), self.length, HIDDEN),
            rotation=self.rotation,
            tensors=self.tensors,
        )

    def row(self, b: int) -> Prompt:
        """Row b alone, without its padding."""
        pad = self.pads[b]
        return Prompt(
            self.query[b : b + 1, :, :, pad:],
            self.key[b : b + 1, :, pad:],
            self.value[b : b + 1, :, pad:],
            (0,),
            self.output_weight,
            self.rotation,
            self.sharp,
            None if self.budget is None else self.budget[b : b + 1],
            None if self.candidate is None else self.candidate[b : b + 1, :, pad:],
        )


def prompt(
    seed: int = 0,
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    length: int = 30,
    dim: int = 8,
    value_dim: int = 5,
    pads: tuple[int, ...] | None = None,
    sharp: float = 3.0,
) -> Prompt:
    g = torch.Generator().manual_seed(seed)
    return Prompt(
        torch.randn(batch, heads, group, length, dim, generator=g),
        torch.randn(batch, heads, length, dim, generator=g),
        torch.randn(batch, heads, length, value_dim, generator=g),
        pads or (0,) * batch,
        torch.randn(heads, HIDDEN, group * value_dim, generator=g),
        Rotation(torch.tensor([1.0, 0.03], dtype=torch.float64), "half-split"),
        sharp,
    )


def scores_of(
    scorer: Scorer,
    data: Prompt,
    *,
    block: int | None = None,
    score_rows: int | None = None,
    score_stride: int | None = None,
    pool_tokens: int = 1,
    finish: bool = True,
) -> Tensor:
    """``[B, H, T]`` at the prompt's end, its rows collected `block` at a time."""
    tokens = data.tokens(scorer.query_rows)
    score = scorer.arrive(tokens).clone()
    attention = data.attention()
    batch, heads, group, length, _ = attention.shape
    first_vote = 0 if score_rows is None else length - score_rows
    if score_rows is not None and score_stride is not None:
        attention = attention * _counts(data, first_vote, score_rows, score_stride)
        first_vote = 0
    for low in range(0, length, block or length):
        rows = torch.arange(low, min(length, low + (block or length)))
        index = rows - torch.tensor(data.pads)[:, None]
        weight = scorer.row_weight(index) * (rows >= first_vote) * (index >= 0) / group
        stop = int(rows[-1]) + 1
        if not scorer.uses_attention:
            continue
        votes = scorer.collect(
            attention[:, :, :, rows, :stop].flatten(0, 1),
            QueryRows(weight.repeat_interleave(heads, 0), index.repeat_interleave(heads, 0), rows),
        ).unflatten(0, (batch, heads))
        if scorer.across_heads:
            votes = votes.mean(1, keepdim=True).expand_as(votes)
        score[:, :, :stop] = scorer.merge(score[:, :, :stop], votes)
    return finished(scorer, score, tokens, pool_tokens) if finish else score


def _counts(data: Prompt, first_last: int, near: int, stride: int) -> Tensor:
    """``[B, 1, 1, T, T]``: how often each row counts for each key."""
    row = torch.arange(data.length)
    weights = [
        pair_weight(row - pad, row - pad, first_last - pad, near, stride) for pad in data.pads
    ]
    return torch.stack(weights)[:, None, None]


def ranks_of(scorer: Scorer, data: Prompt, **settings: int) -> Tensor:
    """``[B, H, T]`` ranks at the prompt's end."""
    score_rows = settings.get("score_rows")
    last_alone = score_rows is not None and "score_stride" not in settings
    first_vote = data.length - score_rows if last_alone else 0
    position = torch.arange(data.length)
    votes = data.length - position.clamp(min=first_vote)
    return scorer.rank(scores_of(scorer, data, **settings), votes, data.length - 1)
