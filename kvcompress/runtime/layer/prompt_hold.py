"""Layers that can hold a prompt uncompressed until it ends, and have the model read it again."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.layer.base import StoringLayer
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.prompt.attention_inputs import NOTHING, AttentionInputs
from kvcompress.runtime.prompt.choose import DIAGNOSED_ROWS
from kvcompress.runtime.prompt.score_queries import LateScoreQueries
from kvcompress.runtime.prompt.store_prompt import PromptToStore
from kvcompress.runtime.store.attend import Chunk, attend, score_rows
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.runtime.torch_modes import leaving_plain_tensors


class HoldingLayer(StoringLayer):
    """See the module docstring.

    Args:
        spans: per row the protected tokens, or one tuple for every row.
        hold_prompt: keep a prompt uncompressed until it ends, see `CompressedCache`.
    """

    def __init__(
        self,
        settings: LayerSettings,
        spans: list[tuple[range, ...]] | tuple[range, ...] = (),
        hold_prompt: bool = False,
    ) -> None:
        super().__init__(settings, spans)
        self._hold_prompt = hold_prompt or settings.whole_prompt
        self._pending: PendingChunk | None = None
        self._late = LateScoreQueries()
        # what the attention module tells in a forward; of the last one for a prompt that is held
        self.attention_inputs: AttentionInputs = NOTHING
        self.reads_again = False

    def reset(self) -> None:
        super().reset()
        self._pending, self._late = None, LateScoreQueries()
        self.attention_inputs, self.reads_again = NOTHING, False

    @property
    def has_pending(self) -> bool:
        return self._pending is not None

    def _hold(self, pending: PendingChunk) -> None:
        """Keep a part of a prompt, and of its queries those that may have to vote at its end."""
        query = pending.chunk.query
        keep = self._late_queries()
        if keep and self._pending is not None:
            query = torch.cat([self._pending.chunk.query, query], 2)
        query = query[:, :, query.shape[2] - min(keep, query.shape[2]) :]
        self._pending = pending.without_queries_but(query)

    def _late_queries(self) -> int:
        """Newest queries that are needed at the prompt's end."""
        plan = self.settings.plan
        late = (plan.score_rows or 0) if plan.score_stride is None and self._votes_late() else 0
        if not self.settings.whole_prompt:
            return max(late, self.settings.scorer.query_rows)
        rows = DIAGNOSED_ROWS if self.settings.chosen_by_head else 0
        return max(late, rows, self.settings.scorer.query_rows)

    def _votes_late(self) -> bool:
        """Only the last rows of the prompt vote, and while it goes on nobody knows which."""
        assert self.state is not None
        first = not any(self.state.row_seen)
        return self._hold_prompt and first and self.settings.plan.score_rows is not None

    @leaving_plain_tensors
    def prompt_to_store(self) -> PromptToStore | None:
        """The held prompt, ready to be compressed; None where none is held."""
        if self._pending is None:
            return None
        late = self._votes_late()
        (chunk, scores), self._pending = (self._pending.chunk, self._pending.scores), None
        state = self.state
        assert state is not None
        if late and self.settings.plan.score_stride is not None:
            self._late.vote(state, chunk, scores)
        elif late and self.settings.scorer.uses_attention:
            rows = min(self.settings.plan.score_rows or 0, chunk.length)
            state.first_vote = chunk.position + chunk.length - rows
            score_rows(state, chunk, scores, chunk.length - rows)
        attention_inputs, self.attention_inputs = self.attention_inputs, NOTHING
        return PromptToStore(state, chunk, scores, attention_inputs)

    @leaving_plain_tensors
    def end_prefill(self) -> None:
        """Compress a prompt that is held."""
        prompt = self.prompt_to_store()
        if prompt is not None:
            prompt.finish()

    # ---- reading a prompt again
    def _read_again(self, chunk: Chunk) -> Tensor:
        """Attend over the held prompt and the chunk; its queries vote and nothing is stored."""
        held, state = self._pending, self.state
        if held is None or state is None or any(state.row_seen):
            raise KVCompressError(
                f"layer {self.settings.layer}: only a prompt that is held can be read again"
            )
        votes = {
            number: torch.cat([s, s.new_zeros(*s.shape[:2], chunk.length)], 2)
            for number, s in held.scores.items()
        }
        hidden = self.attention_inputs.hidden
        if "hidden" in self.settings.scorer.needs and hidden is not None:
            chunk = replace(chunk, norm=hidden.float().norm(dim=-1))
        before = state.first_vote
        state.first_vote = 0
        out = attend(state, held.followed_by(chunk), votes, voting=True)
        state.first_vote = before
        kept = {number: s[:, :, : -chunk.length] for number, s in votes.items()}
        self._pending = replace(held, scores=kept)
        self.seen -= chunk.length
        return out.transpose(1, 2).contiguous()
