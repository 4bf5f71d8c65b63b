"""What a scorer is: how a token's score starts, grows with attention, is finished, and ranks.

The life of a score, for the prompt-only, the accumulating and the in-between methods alike:
  arrive   when the token arrives, from what the layer knows of it alone
  collect  what some query rows say of each key, from their attention weights
  merge    joins that to the score so far
  finish   at the end of a prompt or of a part of it, with all of its tokens side by side
  rank     the number that tokens compete by
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
class Rows:
    """Some query rows, as `Scorer.collect` sees them.

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
    """Tokens of one layer side by side: a prompt, a part of one, or one decoded token.

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
        needs: of ``output_weight``, ``hidden``, ``rotation``: what `Tokens` has to bring; and
            ``repeat``: the votes are those of a second reading of the prompt (KVzip).
        query_rows: newest queries of a prompt that `finish` wants to see.
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
        """Votes are weighted sums, added to the score: the form that a compiled step serves."""
        plain = all(
            self.runs(hook) is getattr(Scorer, hook) for hook in ("collect", "merge", "arrive")
        )
        return plain and not self.across_heads

    @property
    def finishes(self) -> bool:
        """Scores change at the end of a prompt, with keys and values of all its tokens at hand."""
        return self.runs("finish") is not Scorer.finish

    def row_weight(self, row_index: Tensor) -> Tensor:
        """Weight of a query row's attention, from its number among the real tokens."""
        return torch.ones_like(row_index, dtype=torch.float32)

    def collect(self, probability: Tensor, rows: Rows) -> Tensor:
        """``[S, C]`` from attention weights ``[S, G, n, C]``: what the rows say of each key."""
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

    def row_weight(self, row_index: Tensor) -> Tensor:
        return torch.zeros_like(row_index, dtype=torch.float32)

    def initial(self, key: Tensor, position: Tensor, head: Tensor) -> Tensor:
        return newest(position)


def newest(position: Tensor) -> Tensor:
    """Scores above those of `finish`, newer first: for tokens that came after the prompt."""
    return _NEWEST * (1.0 + position.float() * 2.0**-23)
