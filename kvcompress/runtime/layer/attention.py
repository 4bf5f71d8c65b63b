"""How a chunk attends to what a layer holds in segments, by the cheapest way that is exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, final

import torch
from torch import Tensor

from kvcompress.errors import UnsupportedModelError
from kvcompress.runtime.layer.call import AttentionCall
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.layer.relative import attend_relative, in_order
from kvcompress.runtime.prompt.score_queries import LateScoreQueries, attend_prompt
from kvcompress.runtime.store.attend import Chunk, attend, score_rows
from kvcompress.runtime.store.state import LayerState

_NEVER: Final = 1 << 60  # a first vote that no position reaches
Pair = tuple[Tensor, Tensor]  # keys and values


class AbstractAttention(ABC):
    """What the model is given to attend over, and the attention itself.

    Attributes:
        expands: the model expands what it is given before it attends (MLA), so that a draft cannot
            be stored token by token.
    """

    expands: bool

    @abstractmethod
    def shown(self, state: LayerState, held: PendingChunk | None, chunk: Pair) -> Pair:
        """What `update` gives the model in place of the chunk's keys and values."""

    @abstractmethod
    def to_store(self, call: AttentionCall, given: Pair, layer: int, first: bool) -> Pair:
        """Keys and values of the chunk that are to be stored.

        Args:
            given: what `update` got.
            first: nothing came before the chunk.
        """

    @abstractmethod
    def attend(
        self,
        state: LayerState,
        chunk: Chunk,
        scores: dict[int, Tensor],
        call: AttentionCall,
        late: LateScoreQueries | None,
    ) -> Tensor:
        """``[B, T, Hq, D]`` contiguous, with the votes of the chunk's queries in `scores`.

        Args:
            late: takes the queries that vote when the prompt has ended; None where this chunk ends
                it.
        """


def set_first_vote(state: LayerState, chunk: Chunk, late: bool = False) -> int:
    """In a first prompt only the last `score_rows` queries vote; gives the first of them."""
    plan = state.settings.plan
    if plan.score_rows is None or any(state.row_seen) or plan.score_stride is not None:
        return 0
    first = max(0, chunk.length - plan.score_rows)
    state.first_vote = _NEVER if late else chunk.position + first
    return first


def unchanged(call: AttentionCall, given: Pair, layer: int, first: bool) -> Pair:
    """The keys and values to attend over, which must be those that were stored.

    Raises:
        UnsupportedModelError: where the model changes them in between.
    """
    for name, stored, now in (("keys", given[0], call.key), ("values", given[1], call.value)):
        if now is stored:
            continue
        if now.shape != stored.shape or (first and not torch.equal(now, stored)):
            raise UnsupportedModelError(
                f"layer {layer}: the model changes {name} after it stored them "
                f"({tuple(stored.shape)} to {tuple(now.shape)}), which the compressed cache would "
                "not do to the tokens it holds"
            )
    return call.key, call.value


@final
class SegmentAttention(AbstractAttention):
    """Keys are stored as the model made them."""

    expands = False

    def shown(self, state: LayerState, held: PendingChunk | None, chunk: Pair) -> Pair:
        return chunk

    def to_store(self, call: AttentionCall, given: Pair, layer: int, first: bool) -> Pair:
        return unchanged(call, given, layer, first)

    def attend(
        self,
        state: LayerState,
        chunk: Chunk,
        scores: dict[int, Tensor],
        call: AttentionCall,
        late: LateScoreQueries | None,
    ) -> Tensor:
        settings, fast = state.settings, call.fast
        first = set_first_vote(state, chunk, late is not None)
        voting = settings.scorer.uses_attention and any(kind.scored for kind, _ in settings.groups)
        if settings.relative and not in_order(state, chunk):
            out = attend_relative(state, chunk, scores, settings.rotation)
            return out.transpose(1, 2).contiguous()
        empty = not any(state.row_seen)
        if voting and settings.sums and empty:
            return attend_prompt(state, chunk, scores, fast, late)
        if empty and not chunk.held and fast is not None:
            if voting and settings.plan.score_rows is not None and late is None:
                score_rows(state, chunk, scores, first)
                return fast()
            if not voting or late is not None:
                return fast()
        return attend(state, chunk, scores).transpose(1, 2).contiguous()
