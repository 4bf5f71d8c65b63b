"""What a layer with keys does: it attends to a chunk and to what is stored, and then stores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.runtime.layer.attention import AbstractAttention, Pair
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo, Progress
from kvcompress.runtime.layer.intake import Intake
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.layer.relative import parts
from kvcompress.runtime.layer.undo_log import UndoLog
from kvcompress.runtime.prompt.attention_inputs import NOTHING, new_scores
from kvcompress.runtime.prompt.store_prompt import PromptToStore
from kvcompress.runtime.step.cpu import fused_step
from kvcompress.runtime.step.store_token import decodes
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import LayerState
from kvcompress.runtime.torch_modes import leaving_plain_tensors

_MOST_DRAFTED: Final = 256


def refuse_crop(max_length: int, drafted: int) -> None:
    """
    Raises:
        KVCompressError: for tokens that were not drafted while the cache recorded.
    """
    if not 0 <= -max_length <= drafted:
        raise KVCompressError(
            f"crop({max_length}): only the {drafted} newest drafted tokens can be taken back, as "
            "a negative number; call cache.activate_past_recording() before they come"
        )


class AbstractReady(ABC):
    """What a layer does with tokens, however it stores them; made when the first keys come.

    Attributes:
        row_seen: real tokens of each row so far.
    """

    @property
    @abstractmethod
    def row_seen(self) -> list[int]: ...

    def shown(self, key: Tensor, value: Tensor, info: ForwardInfo) -> Pair:
        """What the model is given to attend over in place of a chunk's keys and values."""
        return key, value

    @abstractmethod
    def forward(self, call: AttentionCall, given: Pair, info: ForwardInfo) -> Tensor:
        """Attention of the chunk, then eviction and storage.

        Args:
            given: keys and values of the chunk as `update` got them.

        Returns:
            ``[B, T, Hq, D]`` contiguous.
        """

    def read_shared(self, call: AttentionCall, info: ForwardInfo) -> Tensor:
        """Attention of another layer over these keys.

        Raises:
            UnsupportedModelError: where the plan does not foresee it.
        """
        raise UnsupportedModelError(
            f"layer {call.reader} attends over another layer's keys, which no plan foresees"
        )

    @property
    def awaits_readers(self) -> bool:
        """Whether other layers have still to read the last chunk."""
        return False

    @property
    @abstractmethod
    def has_pending(self) -> bool:
        """Whether a prompt, or a draft, is held uncompressed."""

    @property
    def drafts_wait(self) -> bool:
        """Whether a draft is kept aside and stored only when `crop` says what stays of it."""
        return False

    @abstractmethod
    def prompt_to_store(self) -> PromptToStore | None:
        """The held prompt, ready to be compressed; None where none is held."""

    @abstractmethod
    def end_prefill(self) -> None:
        """Compress a prompt that is held."""

    @abstractmethod
    def crop(self, max_length: int) -> None:
        """Take back the newest ``−max_length`` tokens; 0 says that all drafted tokens stay.

        Raises:
            KVCompressError: for tokens that were not drafted while the cache recorded.
        """

    @abstractmethod
    def select_rows(self, rows: list[int]) -> None:
        """Row b becomes a copy of old row ``rows[b]``.

        Raises:
            KVCompressError: while drafted tokens may still be taken back.
        """

    @abstractmethod
    def refuses_saving(self) -> str | None:
        """Why it cannot be copied to a file now."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor that it holds."""


def refuse_moving_drafts() -> None:
    raise KVCompressError(
        "rows cannot move while drafted tokens may still be taken back; call crop first"
    )


@final
class Ready(AbstractReady):
    """A layer that stores its tokens in segments.

    Args:
        hold_prompt: keep a prompt uncompressed until it ends.
        progress: of the layer, which both change.

    Attributes:
        fused: the compiled decode step, where its gate lets this plan through.
    """

    def __init__(
        self,
        state: LayerState,
        hold_prompt: bool,
        progress: Progress,
        attention: AbstractAttention,
    ) -> None:
        self.state, self.progress, self.attention = state, progress, attention
        self.fused = fused_step(state.settings)
        self.intake = Intake(state, hold_prompt, late_votes=not self.attention.expands)
        self.undo_log = UndoLog()
        self._shared: PendingChunk | None = None

    @property
    def row_seen(self) -> list[int]:
        return self.state.row_seen

    # ---- attention
    def shown(self, key: Tensor, value: Tensor, info: ForwardInfo) -> Pair:
        if not self.attention.expands:
            return key, value
        if self._prompt_is_over(key.shape[2], info):
            self.end_prefill()
        return self.attention.shown(self.state, self.intake.pending, (key, value))

    def forward(self, call: AttentionCall, given: Pair, info: ForwardInfo) -> Tensor:
        state, length, seen = self.state, call.query.shape[2], self.progress.seen
        pair = given
        if call.key is not given[0] or call.value is not given[1]:
            pair = self.attention.to_store(call, given, state.settings.layer, seen == length)
        flags = info.flags if state.settings.uses_classes else None
        fused = self.fused
        if fused is not None and self._just_decodes(call, info) and fused.serves(state, call.query):
            token = Chunk(
                call.query,
                *pair,
                position=seen - 1,
                mask=None,
                valid=None,
                flags=flags,
                scaling=call.scaling,
                softcap=call.softcap,
                sinks=call.sinks,
            )
            return fused.run(state, token)  # stores through pointers, in any mode
        return self._forward(call, pair, flags, info)

    def _just_decodes(self, call: AttentionCall, info: ForwardInfo) -> bool:
        """Whether a forward decodes one token and nothing waits that it has to look at."""
        progress, state = self.progress, self.state
        if call.mask is not None or call.query.shape[2] != 1 or not progress.decoded:
            return False
        if progress.record_past or info.in_prompt or info.reads_again or self.has_pending:
            return False
        return min(state.row_seen) >= state.settings.sink_tokens

    @leaving_plain_tensors
    def _forward(
        self, call: AttentionCall, pair: Pair, flags: Tensor | None, info: ForwardInfo
    ) -> Tensor:
        chunk = call.chunk(pair, self.progress.seen - call.query.shape[2], flags)
        self.intake.inputs = call.inputs
        if info.reads_again:
            self.progress.seen -= chunk.length
            return self.intake.read_again(chunk)
        started = any(self.state.row_seen)
        final_tokens = self.progress.final_tokens(chunk.length, info, started)
        self._note_turn(chunk, final_tokens <= 1 and not info.in_prompt)
        if final_tokens:
            self.undo_log = UndoLog()
        if final_tokens == chunk.length or self.drafts_wait:
            return self._take_in_range(chunk, call, info)
        part, out = replace(call, fast=None), []
        if final_tokens:
            out.append(self._take_in_range(chunk.tokens(0, final_tokens), part, info))
        return torch.cat([*out, *self._take_drafted(chunk, final_tokens, part, info)], 1)

    def _note_turn(self, chunk: Chunk, decodes_now: bool) -> None:
        if not self.state.turn_starts or (self.progress.decoded and not decodes_now):
            self.state.turn_starts.append(chunk.position)
        self.progress.decoded = decodes_now

    def _take_in_range(self, chunk: Chunk, call: AttentionCall, info: ForwardInfo) -> Tensor:
        """`_take`, in parts where relative positions would leave the range of the plan."""
        settings, cuts = self.state.settings, [(0, chunk.length)]
        if settings.relative:
            cuts = parts(settings.plan, chunk.position, chunk.length)
        if len(cuts) == 1:
            return self._take(chunk, call, info)
        part = replace(call, fast=None)
        return torch.cat([self._take(chunk.tokens(*cut), part, info) for cut in cuts], 1)

    def _take(self, chunk: Chunk, call: AttentionCall, info: ForwardInfo) -> Tensor:
        """Attend, then store, or leave it to the last layer that reads these keys."""
        state, intake = self.state, self.intake
        if self._prompt_is_over(chunk.length, info):
            self.end_prefill()
        if self.fused is not None and not intake.waits(chunk.length, info):
            if decodes(state, chunk) and self.fused.serves(state, chunk.query):
                intake.inputs = NOTHING
                return self.fused.run(state, chunk)
        held = intake.pending
        chunk = chunk if held is None else held.followed_by(chunk)
        scores = new_scores(state, chunk, intake.inputs)
        scores = scores if held is None else held.scores_before(scores)
        late = intake.queries_for_later(chunk.length, info)
        out = self.attention.attend(state, chunk, scores, call, late)
        if len(state.settings.readers) > 1:
            self._shared = PendingChunk(chunk, scores)
        else:
            self._store(PendingChunk(chunk, scores), info)
        return out

    def _store(self, chunk: PendingChunk, info: ForwardInfo) -> None:
        self.intake.take(chunk, info, self.progress.record_past and self.drafts_wait)

    # ---- layers that read these keys, too
    @property
    def awaits_readers(self) -> bool:
        return self._shared is not None

    @leaving_plain_tensors
    def read_shared(self, call: AttentionCall, info: ForwardInfo) -> Tensor:
        """Before the keys are stored, and with a vote."""
        settings, shared = self.state.settings, self._shared
        if shared is None or call.reader not in settings.readers:
            raise UnsupportedModelError(
                f"layer {call.reader} attends over the keys of layer {settings.layer}, which the "
                "plan does not foresee"
            )
        query, how = call.query, (call.scaling, call.softcap, call.sinks)
        chunk = replace(shared.chunk, query=query, scaling=how[0], softcap=how[1], sinks=how[2])
        late = self.intake.queries_for_later(chunk.length, info)
        out = self.attention.attend(self.state, chunk, shared.scores, call, late)
        if call.reader == settings.readers[-1]:
            self._shared = None
            self._store(shared, info)
        return out

    # ---- prompts that are held
    @property
    def has_pending(self) -> bool:
        return self.intake.pending is not None

    def prompt_to_store(self) -> PromptToStore | None:
        return self.intake.prompt_to_store()

    def end_prefill(self) -> None:
        self.intake.end_prefill()

    def _prompt_is_over(self, length: int, info: ForwardInfo) -> bool:
        """Whether a forward of `length` tokens shows that what is held is complete."""
        drafting = self.progress.record_past and self.drafts_wait
        return length == 1 and not info.in_prompt and not drafting

    # ---- drafts
    @property
    def drafts_wait(self) -> bool:
        return self.attention.expands or len(self.state.settings.readers) > 1

    def _take_drafted(
        self, chunk: Chunk, first: int, call: AttentionCall, info: ForwardInfo
    ) -> list[Tensor]:
        """The tokens from `first` on, one after the other, each of which `crop` can take back."""
        self.end_prefill()
        state, undo_log, out = self.state, self.undo_log, []
        for index in range(first, chunk.length):
            token = chunk.tokens(index, index + 1)
            (undo_log.before_token if decodes(state, token) else undo_log.before_prompt)(state)
            out.append(self._take(token, call, info))
            UndoLog.stop_notes(state)
        undo_log.forget_all_but(_MOST_DRAFTED)
        return out

    @leaving_plain_tensors
    def crop(self, max_length: int) -> None:
        pending = self.intake.pending if self.drafts_wait else None
        refuse_crop(max_length, len(self.undo_log) if pending is None else pending.tokens)
        if pending is not None:
            self.intake.pending = pending.without_last(-max_length)
            self.end_prefill()
        else:
            for _ in range(-max_length):
                self.undo_log.undo(self.state)
            self.undo_log = UndoLog()

    # ---- rows, files, bytes
    @leaving_plain_tensors
    def select_rows(self, rows: list[int]) -> None:
        if len(self.undo_log):
            refuse_moving_drafts()
        self.end_prefill()
        self.state.select_rows(rows)

    def refuses_saving(self) -> str | None:
        if self._shared is not None:
            return "save the cache between two forwards, not inside one"
        if len(self.undo_log) or (self.has_pending and self.progress.record_past):
            return "drafted tokens are not settled; call cache.crop(0) first"
        if self.has_pending:
            return "a prompt is held uncompressed; call cache.end_prefill() first"
        return None

    def nbytes(self) -> int:
        return self.state.nbytes() + self.intake.nbytes()
