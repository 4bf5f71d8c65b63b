"""The attention function that transformers calls for a model with a plan."""

from __future__ import annotations

from typing import Any, Final, NoReturn, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.layer.call import AttentionCall
from kvcompress.runtime.layer.layer import AbstractLayer
from kvcompress.runtime.model.eager import eager_attention
from kvcompress.runtime.prompt.attention_inputs import NOTHING, AttentionInputs

IMPLEMENTATION: Final = "kvcompress"


def register() -> None:
    """Name our attention and mask functions to transformers; doing it twice changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; see `AttentionCall`."""
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention with position_bias is not built yet"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache, hidden = kwargs.pop("kvc_cache", None), kwargs.pop("kvc_hidden", None)
    layer = _layer_of(module, key, cache)

    def fast() -> Tensor:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=kwargs.get("is_causal"),
        )[0]

    plain = softcap is None and s_aux is None
    if layer is not None:
        inputs = AttentionInputs(module, hidden) if layer.settings.scorer.needs else NOTHING
        call = AttentionCall(
            *(query, key, value, attention_mask, scaling, softcap, s_aux),
            fast=fast if plain else None,
            reader=cast(int, module.layer_idx),
            inputs=inputs,
        )
        return _without_gradient(layer, call), None
    if plain:
        return fast(), None
    return eager_attention(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _without_gradient(layer: AbstractLayer, call: AttentionCall) -> Tensor:
    """Attend without recording a graph, as stored codes have none. Where the caller records one, a
    backward pass through the output raises."""
    if not (torch.is_grad_enabled() and call.query.requires_grad):
        return layer.forward(call)
    with torch.no_grad():
        out = layer.forward(call)
    return cast(Tensor, _NoGradient.apply(out, call.query))


class _NoGradient(torch.autograd.Function):
    """Hands its first input on; a backward pass through it is an error, never a silent zero."""

    @staticmethod
    def forward(ctx: object, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> NoReturn:
        raise KVCompressError(
            "no gradient flows through the compressed cache; train with use_cache=False"
        )


def _layer_of(module: torch.nn.Module, key: Tensor, cache: object) -> AbstractLayer | None:
    """The cache layer that holds these keys. The keys carry it as an attribute, which is lost where
    the model computes new tensors from them; then the module's own number tells the layer."""
    layer = getattr(key, "_kvc_layer", None)
    if layer is None and isinstance(cache, CompressedCache):
        layer = cache.layers[cast(int, module.layer_idx)]
    return layer if isinstance(layer, AbstractLayer) else None
