"""A layer whose old tokens lie in host memory and come back, block by block, for attention.

InfLLM's block memory (arXiv 2402.04617) with the digests of Quest (arXiv 2406.10774): nothing is
lost. `recall.state` says where a token lies, `recall.attend` how it is read.

A draft is attended and stored token by token, as decoding would; the state before it is kept until
`crop` says what stays, and then takes in the tokens that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.layer.attention import Pair, unchanged
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo, Progress
from kvcompress.runtime.layer.layer import CompressedLayer, Spans
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.layer.ready import AbstractReady, refuse_crop, refuse_moving_drafts
from kvcompress.runtime.recall.attend import attend
from kvcompress.runtime.recall.state import RecallState
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.runtime.torch_modes import leaving_plain_tensors

_MOST_DRAFTED: Final = 256


def recall_layer(
    settings: LayerSettings, spans: Spans = (), hold_prompt: bool = False
) -> CompressedLayer:
    """A layer with a recall tier; arguments as for `CompressedLayer`.

    Raises:
        KVCompressError: for protected spans, which have no meaning where nothing is dropped.
    """
    if any(spans):
        raise KVCompressError(
            "protect has no meaning with a recall tier, which drops nothing: leave it out, or "
            "raise the plan's recall_blocks"
        )
    return CompressedLayer(settings, spans, hold_prompt, _begin)


def _begin(
    settings: LayerSettings,
    first: Pair,
    spans: list[tuple[range, ...]],
    hold_prompt: bool,
    progress: Progress,
) -> RecallReady:
    hold = hold_prompt or settings.whole_prompt
    return RecallReady(RecallState.empty(settings, *first), hold, progress)


@dataclass(slots=True)
class _Draft:
    """Tokens that may still be taken back, oldest first, and the state before them."""

    before: RecallState
    tokens: list[Chunk] = field(default_factory=list)


@final
class RecallReady(AbstractReady):
    """See the module docstring; `CompressedLayer.ready` of a layer with a recall tier."""

    def __init__(self, state: RecallState, hold_prompt: bool, progress: Progress) -> None:
        self.state, self.progress = state, progress
        self._hold_prompt = hold_prompt
        self._pending: PendingChunk | None = None
        self._draft: _Draft | None = None

    @property
    def row_seen(self) -> list[int]:
        return self.state.row_seen

    # ---- attention
    @leaving_plain_tensors
    def forward(self, call: AttentionCall, given: Pair, info: ForwardInfo) -> Tensor:
        seen, length = self.progress.seen, call.query.shape[2]
        pair = unchanged(call, given, self.state.settings.layer, seen == length)
        chunk = call.chunk(pair, seen - length, None)
        final_tokens = self.progress.final_tokens(length, info, any(self.row_seen))
        if final_tokens:
            self._settle()
        if final_tokens == length:
            return self._take(chunk, call, info)
        part, out = replace(call, fast=None), []
        if final_tokens:
            out.append(self._take(chunk.tokens(0, final_tokens), part, info))
        self.end_prefill()
        for index in range(final_tokens, length):
            out.append(self._take_token_back_later(chunk.tokens(index, index + 1)))
        return torch.cat(out, 1)

    def _take(self, chunk: Chunk, call: AttentionCall, info: ForwardInfo) -> Tensor:
        """Attend, then store, or hold a prompt that goes on; ``[B, T, Hq, D]``."""
        prompt = chunk.length > 1 or info.in_prompt
        if not prompt:
            self.end_prefill()
        if self._pending is not None:
            chunk = self._pending.followed_by(chunk)
        first = not any(self.row_seen)
        if call.fast is not None and first and not chunk.held:
            out = call.fast()
        else:
            out = attend(self.state, chunk).transpose(1, 2).contiguous()
        if self._hold_prompt and prompt:
            self._pending = PendingChunk(chunk, {}).without_queries_but(chunk.query[:, :, :0])
        else:
            self.state.take_in(chunk.key, chunk.value, chunk.valid, prompt or first)
        return out

    @property
    def has_pending(self) -> bool:
        return self._pending is not None

    def prompt_to_store(self) -> None:
        """Never: nothing is ranked here, so `end_prefill` alone stores a prompt."""

    @leaving_plain_tensors
    def end_prefill(self) -> None:
        if self._pending is not None:
            chunk, self._pending = self._pending.chunk, None
            self.state.take_in(chunk.key, chunk.value, chunk.valid, prompt=True)

    # ---- taking tokens back
    def _take_token_back_later(self, token: Chunk) -> Tensor:
        """Attend and store one drafted token."""
        if self._draft is None:
            self._draft = _Draft(self.state.copy())
        out = attend(self.state, token).transpose(1, 2).contiguous()
        _store(self.state, token)
        self._draft.tokens.append(token)
        if len(self._draft.tokens) > _MOST_DRAFTED:
            _store(self._draft.before, self._draft.tokens.pop(0))
        return out

    def _settle(self) -> None:
        """All drafted tokens stay."""
        if self._draft is not None:
            self._draft.before.release()
            self._draft = None

    @leaving_plain_tensors
    def crop(self, max_length: int) -> None:
        count, draft = -max_length, self._draft
        drafted = 0 if draft is None else len(draft.tokens)
        refuse_crop(max_length, drafted)
        if count and draft is not None:
            self.state.release()
            self.state = draft.before
            for token in draft.tokens[: drafted - count]:
                _store(self.state, token)
            self._draft = None
        self._settle()

    # ---- rows, files, bytes
    @leaving_plain_tensors
    def select_rows(self, rows: list[int]) -> None:
        if self._draft is not None:
            refuse_moving_drafts()
        self.end_prefill()
        self.state.select_rows(rows)

    def refuses_saving(self) -> str:
        """Always; the host's blocks have no place in the format yet."""
        return (
            "a cache with a recall tier cannot be saved yet; run the prompt again, or use a plan "
            "without recall"
        )

    def nbytes(self) -> int:
        """Bytes on the device: the resident part, a held prompt, and what a draft keeps aside."""
        held, draft = self.state.nbytes(), self._draft
        if self._pending is not None:
            held += self._pending.nbytes()
        if draft is not None:
            tokens = sum(t.nbytes for token in draft.tokens for t in (token.key, token.value))
            held += draft.before.nbytes() + tokens
        return held

    def host_nbytes(self) -> int:
        """Bytes of host memory."""
        return self.state.host_nbytes()

    def copied_bytes(self) -> int:
        """Bytes brought back from the host so far."""
        return sum(group.pool.copied_bytes for group in self.state.groups)


def _store(state: RecallState, token: Chunk) -> None:
    state.take_in(token.key, token.value, token.valid, prompt=False)
