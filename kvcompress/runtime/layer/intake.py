"""Where an attended chunk goes: into the store, or held uncompressed until its prompt ends."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.layer.call import ForwardInfo
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.prompt.attention_inputs import NOTHING, AttentionInputs
from kvcompress.runtime.prompt.choose import DIAGNOSED_ROWS
from kvcompress.runtime.prompt.score_queries import LateScoreQueries
from kvcompress.runtime.prompt.store_prompt import PromptToStore, store_prompt
from kvcompress.runtime.step.store_token import decodes, store_token
from kvcompress.runtime.store.attend import Chunk, attend, score_rows
from kvcompress.runtime.store.state import LayerState
from kvcompress.runtime.torch_modes import leaving_plain_tensors


@final
class Intake:
    """See the module docstring.

    Args:
        hold_prompt: keep a prompt uncompressed until it ends, see `CompressedCache`.
        late_votes: queries that vote at a prompt's end can be kept until then.

    Attributes:
        pending: what is held of a prompt, or of a draft, or None.
        inputs: what the attention module told in the last forward.
    """

    def __init__(self, state: LayerState, hold_prompt: bool, late_votes: bool) -> None:
        self.state = state
        self.pending: PendingChunk | None = None
        self.inputs: AttentionInputs = NOTHING
        self._hold_prompt = hold_prompt or state.settings.whole_prompt
        self._late_votes = late_votes
        self._queries = LateScoreQueries()

    def waits(self, length: int, info: ForwardInfo) -> bool:
        """Whether a chunk of `length` tokens is held until its prompt ends."""
        prompt = length > 1 or info.in_prompt or self.pending is not None
        return self._hold_prompt and prompt

    def queries_for_later(self, length: int, info: ForwardInfo) -> LateScoreQueries | None:
        """What takes the voting queries of a chunk of a prompt that goes on, None where they vote
        at once."""
        return self._queries if self._votes_late() and self.waits(length, info) else None

    def _votes_late(self) -> bool:
        """Only the last rows of the prompt vote, and while it goes on nobody knows which."""
        settings = self.state.settings
        first = self._late_votes and not any(self.state.row_seen)
        return first and self._hold_prompt and settings.plan.score_rows is not None

    def take(self, chunk: PendingChunk, info: ForwardInfo, drafts_wait: bool) -> None:
        """Store a chunk that was attended, or hold it.

        Args:
            drafts_wait: it may be a draft that is stored only when `crop` says what stays of it.
        """
        if drafts_wait or self.waits(chunk.chunk.length, info):
            self._hold(chunk)
            return
        if decodes(self.state, chunk.chunk):
            store_token(self.state, chunk.chunk, chunk.scores)
        else:
            store_prompt(self.state, chunk.chunk, chunk.scores, self.inputs)
        self.inputs = NOTHING

    def _hold(self, chunk: PendingChunk) -> None:
        """Keep a part of a prompt, and of its queries those that may have to vote at its end."""
        query = chunk.chunk.query
        keep = self._late_rows()
        if keep and self.pending is not None:
            query = torch.cat([self.pending.chunk.query, query], 2)
        query = query[:, :, query.shape[2] - min(keep, query.shape[2]) :]
        self.pending = chunk.without_queries_but(query)

    def _late_rows(self) -> int:
        """Newest queries that are needed at the prompt's end."""
        settings = self.state.settings
        plan, rows = settings.plan, settings.scorer.query_rows
        if plan.score_stride is None and self._votes_late():
            rows = max(rows, plan.score_rows or 0)
        diagnosed = settings.whole_prompt and settings.chosen_by_head
        return max(rows, DIAGNOSED_ROWS) if diagnosed else rows

    @leaving_plain_tensors
    def prompt_to_store(self) -> PromptToStore | None:
        """The held prompt, ready to be compressed; None where none is held."""
        if self.pending is None:
            return None
        state, plan = self.state, self.state.settings.plan
        late = self._votes_late()
        (chunk, scores), self.pending = (self.pending.chunk, self.pending.scores), None
        if late and plan.score_stride is not None:
            self._queries.vote(state, chunk, scores)
        elif late and state.settings.scorer.uses_attention:
            rows = min(plan.score_rows or 0, chunk.length)
            state.first_vote = chunk.position + chunk.length - rows
            score_rows(state, chunk, scores, chunk.length - rows)
        inputs, self.inputs = self.inputs, NOTHING
        return PromptToStore(state, chunk, scores, inputs)

    def end_prefill(self) -> None:
        """Compress a prompt that is held."""
        if self.pending is not None:
            self._compress()

    @leaving_plain_tensors
    def _compress(self) -> None:
        prompt = self.prompt_to_store()
        if prompt is not None:
            prompt.finish()

    def read_again(self, chunk: Chunk) -> Tensor:
        """Attend over the held prompt and a chunk that repeats it; its queries vote and nothing is
        stored. Gives ``[B, T, Hq, D]``."""
        held, state = self.pending, self.state
        if held is None or any(state.row_seen):
            raise KVCompressError(
                f"layer {state.settings.layer}: only a prompt that is held can be read again"
            )
        votes = {
            number: torch.cat([s, s.new_zeros(*s.shape[:2], chunk.length)], 2)
            for number, s in held.scores.items()
        }
        hidden = self.inputs.hidden
        if "hidden" in state.settings.scorer.needs and hidden is not None:
            chunk = replace(chunk, norm=hidden.float().norm(dim=-1))
        before = state.first_vote
        state.first_vote = 0
        out = attend(state, held.followed_by(chunk), votes, voting=True)
        state.first_vote = before
        kept = {number: s[:, :, : -chunk.length] for number, s in votes.items()}
        self.pending = replace(held, scores=kept)
        return out.transpose(1, 2).contiguous()

    def nbytes(self) -> int:
        held = 0 if self.pending is None else self.pending.nbytes()
        return held + self._queries.nbytes()
