"""A layer whose old tokens lie in host memory and come back, block by block, for attention.

InfLLM's block memory (arXiv 2402.04617) with the digests of Quest (arXiv 2406.10774): nothing is
lost. `recall.state` says where a token lies, `recall.attend` how it is read.

A draft is attended and stored token by token, as decoding would; the state before it is kept until
`crop` says what stays, and then takes in the tokens that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, cast

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.runtime.layer.layer import CompressedLayer, FastAttention
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.names import cropped_tokens
from kvcompress.runtime.recall.attend import attend
from kvcompress.runtime.recall.state import RecallState
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import LayerSettings, LayerState
from kvcompress.runtime.torch_modes import leaving_plain_tensors

_MOST_DRAFTED: Final = 256


@dataclass(slots=True)
class _Draft:
    """Tokens that may still be taken back, oldest first, and the state before them."""

    before: RecallState
    tokens: list[Chunk] = field(default_factory=list)


class RecallLayer(CompressedLayer):
    """`forward` attends, then stores; see the module docstring.

    Raises:
        KVCompressError: for protected spans, which have no meaning where nothing is dropped.
    """

    def __init__(
        self,
        settings: LayerSettings,
        spans: list[tuple[range, ...]] | tuple[range, ...] = (),
        hold_prompt: bool = False,
    ) -> None:
        if any(spans):
            raise KVCompressError(
                "protect has no meaning with a recall tier, which drops nothing: leave it out, or "
                "raise the plan's recall_blocks"
            )
        super().__init__(settings, spans, hold_prompt)
        self._draft: _Draft | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._tier = RecallState.empty(self.settings, key_states, value_states)

    @property
    def _tier(self) -> RecallState:
        """`state`, which answers the same questions of the cache as a `LayerState`."""
        assert self.state is not None
        return cast(RecallState, self.state)

    @_tier.setter
    def _tier(self, state: RecallState) -> None:
        self.state = cast(LayerState, state)

    @leaving_plain_tensors
    def _select(self, rows: list[int]) -> None:
        if self._draft is not None:
            raise KVCompressError(
                "rows cannot move while drafted tokens may still be taken back; call crop first"
            )
        super()._select(rows)

    def reset(self) -> None:
        super().reset()
        self._draft = None

    def check_idle(self) -> None:
        """Refuse to be copied to a file.

        Raises:
            KVCompressError: always; the host's blocks have no place in the format yet.
        """
        raise KVCompressError(
            f"layer {self.settings.layer}: a cache with a recall tier cannot be saved yet; run the "
            "prompt again, or use a plan without recall"
        )

    # ---- attention
    @leaving_plain_tensors
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        fast_attention: FastAttention,
        sinks: Tensor | None = None,
        reader: int | None = None,
    ) -> Tensor:
        """As `CompressedLayer.forward`."""
        self._check_given(key, value)
        chunk = self._chunk(query, key, value, mask, scaling, softcap, sinks)
        final_tokens = self._final_tokens(chunk.length)
        if final_tokens:
            self._settle()
        if final_tokens == chunk.length:
            return self._take(chunk, fast_attention)
        out = [self._take(chunk.tokens(0, final_tokens), None)] if final_tokens else []
        self.end_prefill()
        for index in range(final_tokens, chunk.length):
            out.append(self._take_token_back_later(chunk.tokens(index, index + 1)))
        return torch.cat(out, 1)

    def _take(self, chunk: Chunk, fast_attention: FastAttention) -> Tensor:
        """Attend, then store, or hold a prompt that goes on; ``[B, T, Hq, D]``."""
        tier = self._tier
        prompt = chunk.length > 1 or self.forward_info.in_prompt
        if self._pending is not None and not prompt:
            self.end_prefill()
        if self._pending is not None:
            chunk = self._pending.followed_by(chunk)
        if fast_attention is not None and not any(tier.row_seen) and not chunk.held:
            out = fast_attention()
        else:
            out = attend(tier, chunk).transpose(1, 2).contiguous()
        if self._hold_prompt and prompt:
            self._pending = PendingChunk(chunk, {}).without_queries_but(chunk.query[:, :, :0])
        else:
            first = not any(tier.row_seen)
            tier.take_in(chunk.key, chunk.value, chunk.valid, prompt or first)
        return out

    @leaving_plain_tensors
    def end_prefill(self) -> None:
        """Store a prompt that is held."""
        if self._pending is not None:
            chunk, self._pending = self._pending.chunk, None
            self._tier.take_in(chunk.key, chunk.value, chunk.valid, prompt=True)

    # ---- taking tokens back
    def _take_token_back_later(self, token: Chunk) -> Tensor:
        """Attend and store one drafted token."""
        tier = self._tier
        if self._draft is None:
            self._draft = _Draft(tier.copy())
        out = attend(tier, token).transpose(1, 2).contiguous()
        tier.take_in(token.key, token.value, token.valid, prompt=False)
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
        """Take back the newest ``−max_length`` tokens; 0 says that all drafted tokens stay.

        Raises:
            KVCompressError: for tokens that were not drafted while the cache recorded.
        """
        count = cropped_tokens(max_length)
        drafted = 0 if self._draft is None else len(self._draft.tokens)
        if count < 0 or count > drafted:
            raise KVCompressError(
                f"crop({max_length}): only the {drafted} newest drafted tokens can be taken back, "
                "as a negative number; call cache.activate_past_recording() before they come"
            )
        if count and self._draft is not None:
            self._tier.release()
            self._tier = self._draft.before
            for token in self._draft.tokens[: drafted - count]:
                _store(self._tier, token)
            self._draft = None
        self._settle()
        self.seen -= count

    # ---- bytes
    def nbytes(self) -> int:
        """Bytes on the device: the resident part, a held prompt, and what a draft keeps aside."""
        draft = self._draft
        if draft is None:
            return super().nbytes()
        tokens = sum(t.nbytes for token in draft.tokens for t in (token.key, token.value))
        return super().nbytes() + draft.before.nbytes() + tokens

    def host_nbytes(self) -> int:
        """Bytes of host memory."""
        return 0 if self.state is None else self._tier.host_nbytes()

    def copied_bytes(self) -> int:
        """Bytes brought back from the host so far."""
        return 0 if self.state is None else sum(g.pool.copied_bytes for g in self._tier.groups)


def _store(state: RecallState, token: Chunk) -> None:
    state.take_in(token.key, token.value, token.valid, prompt=False)
