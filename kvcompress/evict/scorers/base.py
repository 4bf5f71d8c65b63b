"""The interface of a scorer: how a token's score starts, grows with attention, ends and ranks.

The hooks of a score's life, in order; every method has the same ones:
  arrive   the score of a token when it arrives, from the token alone
  collect  votes of some query rows on each key, from their attention weights
  merge    the score after these votes
  finish   the score at the end of a prompt or of a part of it, with all of its tokens at hand
  rank     the number by which tokens compete
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcompress.quant.keystats import Rotation

_NEWEST: Final = 2.0**30  # above any score, below the tiers of `kvcompress.evict.keepset`


@dataclass(frozen=True, slots=True)
class QueryRows:
    """Some queries of a batch row, as `Scorer.collect` sees them; a query row is one token's query.

    Attributes:
        weight: ``[S, n]`` float32, `Scorer.row_weight` over the number of query heads that share a
            KV head; 0 where the row may not vote.
        index: ``[S, n]`` number of the row among its sequence's real tokens.
        position: ``[n]`` position, pads counted, as tokens carry it.
        norm: ``[S, n]`` norm of the attention module's input, for a scorer that needs `hidden` and
            collects votes; else None.
    """

    weight: Tensor
    index: Tensor
    position: Tensor
    norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one layer as tensors: a prompt, a part of one, or one decoded token.

    Attributes:
        head: ``[Hg]`` KV head numbers.
        key: ``[B, Hg, T, D]`` as stored, that is after RoPE.
        value: ``[B, Hg, T, Dv]``.
        position: ``[T]`` pads counted.
        valid: ``[B, T]`` bool, False for padding.
        query: ``[B, Hg, G, T', D]`` the newest queries, unscaled; T' may be 0.
        scaling: of the softmax.
        budget: ``[B, Hg]`` tokens that each head's `frequent` budget grants; None on arrival.
        candidate: ``[B, Hg, T]`` bool, tokens that are neither sinks nor recent, which are kept in
            any case; None where that is not known.
        output_weight: ``[Hg, hidden, G · Dv]`` the heads' parts of W_O, for a scorer that needs it.
        hidden: ``[B, T, hidden]`` input of the attention module, for a scorer that needs it.
        rotation: the layer's rotary embedding, for a scorer that needs it; None where it has none.
        tensors: the scorer's trained tensors of this layer, by name.
    """

    layer: int
    head: Tensor
    key: Tensor
    value: Tensor
    position: Tensor
    valid: Tensor
    query: Tensor
    scaling: float
    budget: Tensor | None = None
    candidate: Tensor | None = None
    output_weight: Tensor | None = None
    hidden: Tensor | None = None
    rotation: Rotation | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def spread(self, values: Tensor) -> Tensor:
        """``[T]`` or ``[B, T]`` values for every head, ``[B, Hg, T]``."""
        wide = values if values.ndim == 2 else values[None]
        return wide[:, None].expand(self.key.shape[:-1])


class Scorer:
    """One way to rank the `frequent` tokens of a head; subclasses change what differs.

    Attributes:
        uses_attention: scores grow with attention weights, of the prompt and of decoded tokens.
        across_heads: votes are averaged over the layer's KV heads, which then keep the same tokens.
        needs: fields of `Tokens` that are filled only on demand, of ``output_weight``, ``hidden``
            and ``rotation``; and ``repeat`` where a second reading of the prompt votes (KVzip).
        query_rows: how many of a prompt's newest queries `finish` is given.
        trained: names of the tensors that the profiler trains for this scorer.
    """

    uses_attention: bool = True
    across_heads: bool = False
    needs: frozenset[str] = frozenset()
    query_rows: int = 0
    trained: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def runs(self, hook: str) -> object:
        """The function that a call of `hook` runs, set on the class or on this very scorer.

        A faster form of a step compares it with those that it knows, so that it never runs in
        place of a hook that was changed.
        """
        return vars(self).get(hook, getattr(type(self), hook))

    @property
    def adds_up(self) -> bool:
        """Whether votes are weighted sums that are added to the score: compiled steps do that."""
        plain = all(
            self.runs(hook) is getattr(Scorer, hook) for hook in ("collect", "merge", "arrive")
        )
        return plain and not self.across_heads

    @property
    def finishes(self) -> bool:
        """Whether scores change at the end of a prompt, from keys and values of all its tokens."""
        return self.runs("finish") is not Scorer.finish

    def row_weight(self, row_index: Tensor) -> Tensor:
        """Weight of a query row's attention, from its number among the real tokens."""
        votes = self.uses_attention or "repeat" in self.needs
        return torch.full_like(row_index, float(votes), dtype=torch.float32)

    def collect(self, probability: Tensor, rows: QueryRows) -> Tensor:
        """Votes ``[S, C]`` of the rows on each key, from attention weights ``[S, G, n, C]``."""
        return torch.einsum("sgnc,sn->sc", probability, rows.weight)

    def merge(self, score: Tensor, votes: Tensor) -> Tensor:
        """The score after `votes` of further rows."""
        return score + votes

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        """Score of tokens that nobody has voted on, from keys ``[..., D]``, position and KV head.

        A prompt-only scorer replaces it in `finish`; decoded tokens keep it, see `newest`.
        """
        return torch.zeros(key.shape[:-1], dtype=torch.float32, device=key.device)

    def arrive(self, tokens: Tokens) -> Tensor:
        """``[B, Hg, T]`` score of tokens as they arrive; `initial` unless the scorer needs more."""
        shape = tokens.key.shape[:-1]
        head = tokens.head[None, :, None].expand(shape)
        return self.initial(tokens.key, tokens.position.expand(shape), head)

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        """``[B, Hg, T]`` score at the end of a prompt; `tokens` are those that `score` is of."""
        return score

    def rank(self, score: Tensor, votes: Tensor, now: int | Tensor) -> Tensor:
        """Larger is kept.

        Args:
            votes: number of query rows that could vote on the token.
            now: newest position.
        """
        return score


class PromptScorer(Scorer):
    """A scorer that looks at a prompt once, in `finish`; decoded tokens are kept newest first."""

    uses_attention = False

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        return newest(position)


def newest(position: Tensor) -> Tensor:
    """Scores above those of `finish`, newer first: for tokens that came after the prompt."""
    return _NEWEST * (1.0 + position.float() * 2.0**-23)
