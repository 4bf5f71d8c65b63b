"""One layer of the compressed cache: it attends to what is stored, then stores and evicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.kernels.cpu.library import library
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.layer.prompt_hold import HoldingLayer
from kvcompress.runtime.layer.relative import attend_relative, in_order, parts
from kvcompress.runtime.layer.undo_log import UndoLog
from kvcompress.runtime.names import cropped_tokens
from kvcompress.runtime.prompt.attention_inputs import NOTHING, new_scores
from kvcompress.runtime.prompt.score_queries import attend_prompt
from kvcompress.runtime.prompt.store_prompt import store_prompt
from kvcompress.runtime.step.cpu import FusedStep, IncomingToken, refusal, serves
from kvcompress.runtime.step.store_token import store_token
from kvcompress.runtime.store.attend import Chunk, attend, score_rows
from kvcompress.runtime.store.state import LayerSettings, LayerState
from kvcompress.runtime.torch_modes import between_graphs, leaving_plain_tensors

_NEVER: Final = 1 << 60  # a first vote that no position reaches
_MOST_DRAFTED: Final = 256

# the model's normal attention over the chunk alone; None where it has no such kernel
FastAttention = Callable[[], Tensor] | None


class CompressedLayer(HoldingLayer):
    """Attends to a chunk in `forward` and only then stores it; arguments as for `HoldingLayer`."""

    def __init__(
        self,
        settings: LayerSettings,
        spans: list[tuple[range, ...]] | tuple[range, ...] = (),
        hold_prompt: bool = False,
    ) -> None:
        super().__init__(settings, spans, hold_prompt)
        self._shared: PendingChunk | None = None
        self._undo_log = UndoLog()
        self._decoded = False  # the last forward decoded, so that a prompt opens a turn
        served = library() is not None and refusal(settings) is None
        self._fused = FusedStep(settings) if served else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._shared is not None:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: layers {self.settings.readers[1:]} should have read "
                "its keys and did not"
            )
        return super().update(key_states, value_states)

    @leaving_plain_tensors
    def _select(self, rows: list[int]) -> None:
        if len(self._undo_log):
            raise KVCompressError(
                "rows cannot move while drafted tokens may still be taken back; call crop first"
            )
        self.end_prefill()
        super()._select(rows)

    def reset(self) -> None:
        super().reset()
        self._shared = None
        self._undo_log, self._decoded = UndoLog(), False

    def check_idle(self) -> None:
        """Refuse to be copied to a file while anything waits to be stored or taken back.

        Raises:
            KVCompressError: saying what has to happen first.
        """
        reason = None
        if self._given is not None or self._shared is not None:
            reason = "save the cache between two forwards, not inside one"
        elif len(self._undo_log) or (self._pending is not None and self.record_past):
            reason = "drafted tokens are not settled; call cache.crop(0) first"
        elif self._pending is not None:
            reason = "a prompt is held uncompressed; call cache.end_prefill() first"
        if reason is not None:
            raise KVCompressError(f"layer {self.settings.layer}: {reason}")

    # ---- taking tokens back
    @property
    def _drafts_wait(self) -> bool:
        """Other layers read these keys before they are stored: a draft is then kept aside, and
        stored only when `crop` says what stays of it."""
        return len(self.settings.readers) > 1

    def activate_past_recording(self) -> None:
        """From now on drafted tokens can be taken back with `crop`."""
        self.record_past = True

    @leaving_plain_tensors
    def crop(self, max_length: int) -> None:
        """Take back the newest ``−max_length`` tokens; 0 says that all drafted tokens stay.

        Raises:
            KVCompressError: for tokens that were not drafted while the cache recorded.
        """
        count = cropped_tokens(max_length)
        pending = self._pending if self._drafts_wait else None
        drafted = len(self._undo_log) if pending is None else pending.chunk.key.shape[2]
        if count < 0 or count > drafted:
            raise KVCompressError(
                f"crop({max_length}): only the {drafted} newest drafted tokens can be taken back, "
                "as a negative number; call cache.activate_past_recording() before they come"
            )
        if pending is not None:
            self._pending = pending.without_last(count)
            self.end_prefill()
        else:
            for _ in range(count):
                assert self.state is not None
                self._undo_log.undo(self.state)
            self._undo_log = UndoLog()
        self.seen -= count

    # ---- attention
    @between_graphs
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
        """Attention of the chunk that `update` saw last, then eviction and storage.

        Args:
            query: ``[B, Hq, T, D]``.
            key, value: ``[B, Hkv, T, D]`` the chunk's own.
            mask: ``[B, 1, T, T]`` bool or None (causal).
            fast_attention: gives ``[B, T, Hq, D]``.
            sinks: ``[Hq]`` learned logits that join every softmax.
            reader: number of the layer that attends, where it reads another layer's keys.

        Returns:
            ``[B, T, Hq, D]`` contiguous.
        """
        if reader is not None and reader != self.settings.layer:
            return self._read_shared(query, scaling, softcap, fast_attention, sinks, reader)
        self._check_given(key, value)
        assert self.state is not None
        if mask is None and self._fused is not None and self._just_decodes(query):
            flags = self.forward_info.flags if self.settings.uses_classes else None
            token = IncomingToken(query, key, value, self.seen - 1, flags, scaling, softcap, sinks)
            return self._fused.run(self.state, token)  # stores through pointers, in any mode
        chunk_of = partial(self._chunk, query, key, value, mask, scaling, softcap, sinks)
        return self._forward(chunk_of, fast_attention)

    @leaving_plain_tensors
    def _forward(self, chunk_of: Callable[[], Chunk], fast_attention: FastAttention) -> Tensor:
        chunk = chunk_of()
        if self.reads_again:
            return self._read_again(chunk)
        self._note_turn(chunk)
        final_tokens = self._final_tokens(chunk.length)
        if final_tokens:
            self._undo_log = UndoLog()
        if final_tokens == chunk.length or self._drafts_wait:
            return self._take_in_range(chunk, fast_attention)
        out = [self._take_in_range(chunk.tokens(0, final_tokens), None)] if final_tokens else []
        return torch.cat([*out, *self._take_drafted(chunk, final_tokens)], 1)

    def _check_given(self, key: Tensor, value: Tensor) -> None:
        """The keys and values to attend over must be those that were stored, and be read once."""
        given, self._given = self._given, None
        if given is None:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: the model attends more than once over what it "
                "stored, which the compressed cache cannot serve"
            )
        first = self.seen == key.shape[-2]
        for name, stored, now in (("keys", given[0], key), ("values", given[1], value)):
            if now is stored:
                continue
            if now.shape != stored.shape or (first and not torch.equal(now, stored)):
                raise UnsupportedModelError(
                    f"layer {self.settings.layer}: the model changes {name} after it stored them "
                    f"({tuple(stored.shape)} to {tuple(now.shape)}), which the compressed cache "
                    "would not do to the tokens it holds"
                )

    def _chunk(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Chunk:
        length = query.shape[2]
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-2:] != (length, length)):
            raise KVCompressError(
                f"an attention mask {tuple(mask.shape)} of {mask.dtype} cannot be combined with "
                "the compressed cache; pass the usual 2-dimensional attention_mask"
            )
        valid = None
        if mask is not None:
            valid = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(query.shape[0], -1)
            valid = None if bool(valid.all()) else valid
        flags = self.forward_info.flags if self.settings.uses_classes else None
        return Chunk(
            query.detach(),
            key.detach(),
            value.detach(),
            self.seen - length,
            mask,
            valid,
            None if flags is None else flags.to(key.device),
            scaling,
            softcap,
            sinks,
        )

    def _note_turn(self, chunk: Chunk) -> None:
        assert self.state is not None
        decodes = self._final_tokens(chunk.length) <= 1 and not self.forward_info.in_prompt
        if not self.state.turn_starts or (self._decoded and not decodes):
            self.state.turn_starts.append(chunk.position)
        self._decoded = decodes

    def _final_tokens(self, length: int) -> int:
        """Tokens at the head of a chunk that will not be taken back."""
        assert self.state is not None
        if not self.record_past:
            return length
        final_tokens = self.forward_info.final_tokens
        if final_tokens is None:
            final_tokens = 0 if any(self.state.row_seen) else length
        return 0 if final_tokens == 1 and any(self.state.row_seen) else final_tokens

    # ---- storing
    def _take_in_range(self, chunk: Chunk, fast_attention: FastAttention) -> Tensor:
        """`_take`, in parts where relative positions would leave the range of the plan."""
        cuts = [(0, chunk.length)]
        if self.settings.relative:
            cuts = parts(self.settings.plan, chunk.position, chunk.length)
        if len(cuts) == 1:
            return self._take(chunk, fast_attention)
        return torch.cat([self._take(chunk.tokens(*cut), None) for cut in cuts], 1)

    def _take(self, chunk: Chunk, fast_attention: FastAttention) -> Tensor:
        """Attend, then store, or leave it to the last layer that reads these keys."""
        assert self.state is not None
        if self._prompt_is_over(chunk.length):
            self.end_prefill()
        if self._fused is not None and self._is_step(chunk):
            self.attention_inputs = NOTHING
            return self._fused.run(self.state, IncomingToken.of(chunk))
        if self._pending is not None:
            chunk = self._pending.followed_by(chunk)
        scores = new_scores(self.state, chunk, self.attention_inputs)
        if self._pending is not None:
            scores = self._pending.scores_before(scores)
        out = self._attend(chunk, scores, fast_attention)
        pending = PendingChunk(chunk, scores)
        if len(self.settings.readers) > 1:
            self._shared = pending
        else:
            self._store(pending)
        return out

    def _just_decodes(self, query: Tensor) -> bool:
        """Whether a forward decodes one token and nothing waits that it has to look at."""
        state = self.state
        assert state is not None
        busy = self._pending is not None or self.record_past or self.reads_again
        if busy or self.forward_info.in_prompt or query.shape[2] != 1 or not self._decoded:
            return False
        return min(state.row_seen) >= self.settings.sink_tokens and serves(state, query)

    def _is_step(self, chunk: Chunk) -> bool:
        """Whether a chunk is a token that one call of the compiled kernels takes in."""
        assert self.state is not None
        waits = self._pending is not None or (self._hold_prompt and self.forward_info.in_prompt)
        return not waits and _decodes(self.state, chunk) and serves(self.state, chunk.query)

    @leaving_plain_tensors
    def _read_shared(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        fast_attention: FastAttention,
        sinks: Tensor | None,
        reader: int,
    ) -> Tensor:
        """Attention of another layer over these keys: before they are stored, and with a vote."""
        if self._shared is None or reader not in self.settings.readers:
            raise UnsupportedModelError(
                f"layer {reader} attends over the keys of layer {self.settings.layer}, which the "
                "plan does not foresee"
            )
        chunk = replace(
            self._shared.chunk, query=query, scaling=scaling, softcap=softcap, sinks=sinks
        )
        out = self._attend(chunk, self._shared.scores, fast_attention)
        if reader == self.settings.readers[-1]:
            pending, self._shared = self._shared, None
            self._store(pending)
        return out

    def _store(self, pending: PendingChunk) -> None:
        state, chunk = self.state, pending.chunk
        assert state is not None
        if self._waits(chunk) or (self.record_past and self._drafts_wait):
            self._hold(pending)
            return
        if _decodes(state, chunk):
            store_token(state, chunk, pending.scores)
        else:
            store_prompt(state, chunk, pending.scores, self.attention_inputs)
        self.attention_inputs = NOTHING

    def _waits(self, chunk: Chunk) -> bool:
        """Whether a chunk is held until its prompt ends."""
        prompt = chunk.length > 1 or self.forward_info.in_prompt or self._pending is not None
        return self._hold_prompt and prompt

    def _take_drafted(self, chunk: Chunk, first: int) -> list[Tensor]:
        """The tokens from `first` on, one after the other, each of which `crop` can take back."""
        self.end_prefill()
        state = self.state
        assert state is not None
        out = []
        for index in range(first, chunk.length):
            token = chunk.tokens(index, index + 1)
            undo_log = self._undo_log
            (undo_log.before_token if _decodes(state, token) else undo_log.before_prompt)(state)
            out.append(self._take(token, None))
            UndoLog.stop_notes(state)
        self._undo_log.forget_all_but(_MOST_DRAFTED)
        return out

    def _prompt_is_over(self, length: int) -> bool:
        """Whether a forward of `length` tokens shows that what is held is complete."""
        drafting = self.record_past and self._drafts_wait
        return length == 1 and not self.forward_info.in_prompt and not drafting

    def _attend(
        self, chunk: Chunk, scores: dict[int, Tensor], fast_attention: FastAttention
    ) -> Tensor:
        """``[B, T, Hq, D]``, with the votes of the chunk's queries."""
        state, settings = self.state, self.settings
        assert state is not None
        late = self._votes_late() and self._waits(chunk)
        rows, first = settings.plan.score_rows, self._set_first_vote(chunk, late)
        voting = settings.scorer.uses_attention and any(kind.scored for kind, _ in settings.groups)
        if settings.relative and not in_order(state, chunk):
            out = attend_relative(state, chunk, scores, settings.rotation)
            return out.transpose(1, 2).contiguous()
        if voting and settings.sums and not any(state.row_seen):
            return attend_prompt(state, chunk, scores, fast_attention, self._late, late)
        if not any(state.row_seen) and not chunk.held and fast_attention is not None:
            if voting and rows is not None and not late:
                score_rows(state, chunk, scores, first)
                return fast_attention()
            if not voting or late:
                return fast_attention()
        return attend(state, chunk, scores).transpose(1, 2).contiguous()

    def _set_first_vote(self, chunk: Chunk, late: bool = False) -> int:
        """In a first prompt only the last `score_rows` queries vote; gives the first of them."""
        state, rows = self.state, self.settings.plan.score_rows
        assert state is not None
        if rows is None or any(state.row_seen) or self.settings.plan.score_stride is not None:
            return 0
        first = max(0, chunk.length - rows)
        state.first_vote = _NEVER if late else chunk.position + first
        return first

    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        held = 0 if self._pending is None else self._pending.nbytes()
        return super().nbytes() + held + self._late.nbytes()


def _decodes(state: LayerState, chunk: Chunk) -> bool:
    """Whether a chunk is one decoded token, for which the layer keeps its layout."""
    full_sinks = min(state.row_seen) >= state.settings.sink_tokens
    one = chunk.key.shape[2] == 1 and chunk.valid is None
    return one and full_sinks and any(state.row_seen)
