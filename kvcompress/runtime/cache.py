"""The compressed KV cache, as transformers' `generate` uses it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.attend import Chunk, attend, new_scores, score_rows
from kvcompress.runtime.commit import commit
from kvcompress.runtime.insert import insert
from kvcompress.runtime.state import LayerSettings, LayerState


class CompressedLayer(CacheLayerMixin):
    """One layer. `update` hands the chunk through; `forward` attends and only then stores it."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.is_sliding = settings.window is not None
        self.sliding_window = settings.window
        self.seen = 0
        self.state: LayerState | None = None
        self.flags: Tensor | None = None
        self._unread = False

    # ---- what transformers calls
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.settings.plan.model
        if key_states.shape[1] != shape.kv_heads or key_states.shape[-1] != shape.head_dim:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: keys {tuple(key_states.shape)}, the plan is for "
                f"{shape.kv_heads} KV heads of {shape.head_dim} channels; use this model's own plan"
            )
        if value_states.shape != key_states.shape:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: values {tuple(value_states.shape)} differ in shape "
                f"from keys {tuple(key_states.shape)}; such models are not built yet"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = LayerState.empty(self.settings, key_states, value_states)
        self.keys = self.values = key_states.new_zeros(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._unread:
            raise UnsupportedModelError(
                f"layer {self.settings.layer}: the model stored keys but never called the "
                "compressed attention, so its output would be wrong; call "
                "kvcompress.attach(model, plan) first"
            )
        self._unread = True
        self.seen += key_states.shape[-2]
        key_states._kvc_layer = self  # type: ignore[attr-defined]  # how the attention finds its layer
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions and masks follow it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the chunk: stored tokens are masked from their own positions."""
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.select_rows([r for r in range(self.state.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state.select_rows(torch.arange(self.state.batch)[indices.cpu()].tolist())

    def reset(self) -> None:
        self.seen, self.state, self._unread = 0, None, False
        self.is_initialized = False

    def offload(self) -> None:
        raise KVCompressError("the compressed cache cannot be offloaded; drop offloading=True")

    prefetch = offload

    def activate_past_recording(self) -> None:
        raise KVCompressError(
            "assisted decoding takes tokens back, which the compressed cache cannot do yet; "
            "generate without assistant_model and prompt_lookup_num_tokens"
        )

    def crop(self, max_length: int) -> None:
        self.activate_past_recording()

    # ---- attention
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        fast_attention: Any,
    ) -> Tensor:
        """Attention of the chunk that `update` saw last, then eviction and storage.

        Args:
            query: ``[B, Hq, T, D]``.
            key, value: ``[B, Hkv, T, D]`` the chunk's own.
            mask: ``[B, 1, T, T]`` bool or None (causal).
            fast_attention: without arguments, the model's normal kernel over the chunk alone.

        Returns:
            ``[B, T, Hq, D]`` contiguous.
        """
        self._unread = False
        assert self.state is not None
        length = query.shape[2]
        if mask is not None and mask.dtype != torch.bool:
            raise KVCompressError(
                "a float attention mask cannot be combined with the compressed cache; "
                "pass the usual 2-dimensional attention_mask"
            )
        valid = None
        if mask is not None:
            valid = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(query.shape[0], -1)
            valid = None if bool(valid.all()) else valid
        flags = self.flags if self.settings.uses_classes else None
        chunk = Chunk(query, key, value, self.seen - length, mask, valid, flags, scaling, softcap)
        out, scores = self._attend(chunk, fast_attention)
        full_sinks = min(self.state.row_seen) >= self.settings.sink_tokens
        if length == 1 and valid is None and full_sinks and any(self.state.row_seen):
            insert(self.state, chunk, scores)
        else:
            commit(self.state, chunk, scores)
        return out

    def _attend(self, chunk: Chunk, fast_attention: Any) -> tuple[Tensor, dict[int, Tensor]]:
        state, settings = self.state, self.settings
        assert state is not None
        first, rows = not any(state.row_seen), settings.plan.score_rows
        if first and rows is not None:
            state.first_vote = chunk.position + max(0, chunk.length - rows)
        voting = settings.scorer.uses_attention and any(kind.scored for kind, _ in settings.groups)
        if first and chunk.softcap is None and not voting:
            return fast_attention(), new_scores(state, chunk)
        if first and chunk.softcap is None and rows is not None:
            return fast_attention(), score_rows(state, chunk, max(0, chunk.length - rows))
        out, scores = attend(state, chunk)
        return out.transpose(1, 2).contiguous(), scores

    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        return 0 if self.state is None else self.state.nbytes()


class CompressedCache(Cache):
    """A KV cache that follows a plan; pass it as `past_key_values`, or let `generate` make it.

    Args:
        plan: of this very model; see `kvcompress.attach`.
        params: key centre and scale; None is centre 0 and scale 1.
    """

    def __init__(self, plan: Plan, params: KVParams | None = None) -> None:
        self.plan = plan
        settings = [LayerSettings(plan, params, layer) for layer in range(plan.model.layers)]
        super().__init__(layers=[CompressedLayer(s) for s in settings])
        self._class_ids = _ClassIds(plan)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        memo[id(self.plan)] = self.plan
        memo[id(self._class_ids)] = self._class_ids
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copied

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        return cast(list[CompressedLayer], self.layers)

    def note_tokens(self, input_ids: Tensor | None) -> None:
        """Tell every layer the classes of the tokens, ``[B, T]``, that the next forward brings."""
        uses = any(layer.settings.uses_classes for layer in self.compressed_layers)
        flags = self._class_ids.flags(input_ids) if uses and input_ids is not None else None
        for layer in self.compressed_layers:
            layer.flags = flags

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds, metadata included."""
        return sum(layer.nbytes() for layer in self.compressed_layers)


class _ClassIds:
    """Token id to class flags."""

    def __init__(self, plan: Plan) -> None:
        self._special = torch.tensor(plan.special_ids, dtype=torch.int64)
        self._punct = torch.tensor(plan.punct_ids, dtype=torch.int64)

    def flags(self, ids: Tensor) -> Tensor:
        """``[B, T]`` uint8."""
        special = torch.isin(ids, self._special.to(ids.device))
        punct = torch.isin(ids, self._punct.to(ids.device))
        return (special * SPECIAL_FLAG + punct * PUNCT_FLAG).to(torch.uint8)
