"""What transformers asks of a cache layer, for layers that keep a state of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.runtime.names import CACHE, release
from kvcompress.runtime.store.state import LayerSettings, LayerState
from kvcompress.runtime.torch_modes import between_graphs, leaving_plain_tensors


def refuse_change(name: str, held: Any, came: Any) -> None:
    """
    Raises:
        KVCompressError: where a forward differs from what the cache holds.
    """
    if held != came:
        raise KVCompressError(
            f"the cache holds tokens of {name} {held}, this forward has {name} {came}: pass the "
            "same batch to the same model, or call cache.reset()"
        )


@dataclass(slots=True)
class ForwardInfo:
    """What the cache knows of a forward before its layers run, shared by all of them.

    Attributes:
        flags: ``[B, T]`` uint8 class flags, or None.
        final_tokens: tokens at its head that will not be taken back; the rest of the chunk is a
            draft. None: all, or, while a cache records, none but those of a first prompt.
        in_prompt: the forward is a part of a prompt that goes on, whatever its length.
        length: T, 0 where it is not known.
    """

    flags: Tensor | None = None
    final_tokens: int | None = None
    in_prompt: bool = False
    length: int = 0


class StoringLayer(CacheLayerMixin):
    """`update` hands the chunk through; the attention function stores it.

    Args:
        spans: one tuple of protected tokens for every row, or a list of them, one per row.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(
        self, settings: LayerSettings, spans: list[tuple[range, ...]] | tuple[range, ...] = ()
    ) -> None:
        super().__init__()
        self.settings = settings
        self.sliding_window = settings.window if settings.block is None else settings.block
        self.is_sliding = self.sliding_window is not None
        self.seen = 0
        self.state: LayerState | None = None
        self.record_past = False  # drafted tokens can be taken back
        self.forward_info = ForwardInfo()
        self._announced = False
        self._spans = spans
        # the keys and values that `update` handed on, until they are read
        self._given: tuple[Tensor, Tensor] | None = None

    # ---- what transformers calls
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can take tokens back; transformers 5.24 asks before it drafts."""
        return self.record_past

    @leaving_plain_tensors
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.settings.plan.model
        heads = len(self.settings.heads)
        if key_states.shape[1] != heads or key_states.shape[-1] != shape.head_dim:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: keys {tuple(key_states.shape)}, the plan is for "
                f"{heads} KV heads of {shape.head_dim} channels; use this model's own plan"
            )
        if value_states.shape[1] != heads or value_states.shape[-1] != shape.v_dim:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: values {tuple(value_states.shape)}, the plan is for "
                f"{heads} KV heads of {shape.v_dim} channels"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        spans = self._spans
        batch = key_states.shape[0]
        if not isinstance(spans, list):
            spans = [tuple(spans)] * batch
        if len(spans) != batch:
            raise KVCompressError(
                f"protect names the tokens of {len(spans)} rows, the batch has {batch}"
            )
        self.state = LayerState.empty(self.settings, key_states, value_states, list(spans))
        self.keys = self.values = key_states.new_zeros(0)
        self.is_initialized = True

    @between_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._take_announcement(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_fits(key_states)
        if self._given is not None:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: the model stored keys but never called the "
                "compressed attention, so its output would be wrong; call "
                "kvcompress.attach(model, plan) first"
            )
        self._given = (key_states, value_states)
        self.seen += key_states.shape[-2]
        key_states._kvc_layer = self  # type: ignore[attr-defined]  # how the attention finds its layer
        return key_states, value_states

    # ---- the handshake with the model's pre-hook
    def announce(self, forward_info: ForwardInfo) -> None:
        """The next call of `update` belongs to this forward."""
        self.forward_info, self._announced = forward_info, True

    def _take_announcement(self, key_states: Tensor) -> None:
        """Refuse a forward of which the cache was not told, or was told otherwise.

        Raises:
            KVCompressError: naming the release and how the cache has to be passed.
        """
        length, announced = key_states.shape[-2], self._announced
        self._announced = False
        if not announced or self.forward_info.length not in (0, length):
            was = f"announced with {self.forward_info.length}" if announced else "not announced"
            raise KVCompressError(
                f"layer {self.settings.layer}: a forward of {length} tokens was {was} to its cache "
                f"({release()}): call kvcompress.attach(model, plan) first, then the model itself, "
                f"no part of it, with the cache as {CACHE}="
            )

    def _check_fits(self, key_states: Tensor) -> None:
        """Refuse another batch, dtype or device than that of the tokens held.

        Raises:
            KVCompressError: naming both.
        """
        state = self.state
        if state is None:
            return
        held = {"rows": state.batch, "dtype": self.dtype, "device": self.device}
        came = (key_states.shape[0], key_states.dtype, key_states.device)
        for (name, have), now in zip(held.items(), came, strict=True):
            refuse_change(name, have, now)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions and masks follow it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the chunk: stored tokens are masked from their own positions."""
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self._select([r for r in range(self.state.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self._select(torch.arange(self.state.batch)[indices.cpu()].tolist())

    def _select(self, rows: list[int]) -> None:
        if self.state is not None:
            self.state.select_rows(rows)

    def reset(self) -> None:
        self.seen, self.state, self.is_initialized = 0, None, False
        self._given, self._announced = None, False

    def offload(self) -> None:
        raise KVCompressError("the compressed cache cannot be offloaded; drop offloading=True")

    prefetch = offload

    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        return 0 if self.state is None else self.state.nbytes()
