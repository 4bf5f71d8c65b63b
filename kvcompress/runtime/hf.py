"""The seam to transformers: the only file of the runtime that touches its private names."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.errors import KVCompressError, PlanError, UnsupportedModelError
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache import CompressedCache, CompressedLayer
from kvcompress.runtime.families import check, shape_of

IMPLEMENTATION: Final = "kvcompress"
_ATTACHED: Final = "_kvcompress_attached"


class _Attached:
    """What `attach` changed on a model, so that `detach` can undo it."""

    def __init__(self, plan: Plan, params: KVParams | None, before: str) -> None:
        self.plan, self.params, self.before = plan, params, before
        self.hook: Any = None


def attach(model: PreTrainedModel, plan: Plan, params: KVParams | None = None) -> PreTrainedModel:
    """Let `model.generate` use the compressed cache of `plan` by default; returns the model.

    A cache that the caller passes, or `use_cache=False`, still wins. Attaching again replaces the
    plan.

    Raises:
        UnsupportedModelError: if the model's attention cannot be served exactly.
        PlanError: if the plan was made for another architecture.
    """
    check(model)
    _check_plan(model, plan)
    attached: _Attached | None = model.__dict__.get(_ATTACHED)
    if attached is not None:
        attached.plan, attached.params = plan, params
        return model
    _register()
    attached = _Attached(plan, params, model.config._attn_implementation or "sdpa")
    model.set_attn_implementation(IMPLEMENTATION)
    attached.hook = model.register_forward_pre_hook(_note_tokens, with_kwargs=True)
    model.__dict__[_ATTACHED] = attached
    model.__dict__["_prepare_cache_for_generation"] = types.MethodType(_prepare_cache, model)
    model.__dict__["generate_batch"] = _refuse_generate_batch
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; the model is transformers' own again."""
    attached: _Attached | None = model.__dict__.pop(_ATTACHED, None)
    if attached is not None:
        attached.hook.remove()
        for name in ("_prepare_cache_for_generation", "generate_batch"):
            model.__dict__.pop(name, None)
        model.set_attn_implementation(attached.before)
    return model


def attached(model: PreTrainedModel) -> tuple[Plan, KVParams | None] | None:
    """The plan and key constants that the model serves now, None without any."""
    found: _Attached | None = model.__dict__.get(_ATTACHED)
    return None if found is None else (found.plan, found.params)


def _check_plan(model: PreTrainedModel, plan: Plan) -> None:
    shape = shape_of(model.config, model.dtype)
    for name in ("config_hash", "layers", "kv_heads", "head_dim", "sliding_windows"):
        have, want = getattr(shape, name), getattr(plan.model, name)
        if have != want:
            raise PlanError(
                f"the plan is for another model: its {name} is {want}, this model's is {have}; "
                "profile this model and plan again"
            )


def _register() -> None:
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; see `CompressedLayer.forward`."""
    layer = getattr(key, "_kvc_layer", None)
    cache = kwargs.pop("kvc_cache", None)
    if layer is None and isinstance(cache, CompressedCache):
        layer = cache.compressed_layers[cast(int, module.layer_idx)]
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}: attention with {name} is not built yet"
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

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

    if isinstance(layer, CompressedLayer):
        out = layer.forward(query, key, value, attention_mask, scaling, softcap, fast)
        return out, None
    if softcap is not None:
        return _eager_softcap(module, query, key, value, attention_mask, scaling, softcap), None
    return fast(), None


def _eager_softcap(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, cap: float
) -> Tensor:
    """Attention without our cache for models with a softcap, which sdpa cannot compute."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.tanh((q.float() @ k.float().mT) * scaling / cap) * cap
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    return (logits.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous()


def _note_tokens(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the cache learns the token ids, the attention function learns the cache."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedCache):
        kwargs["kvc_cache"] = cache
        ids = kwargs.get("input_ids")
        cache.note_tokens(args[0] if ids is None and args else ids)
    return args, kwargs


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """`generate` asks for a cache: ours, unless the caller chose one."""
    attached: _Attached = model.__dict__[_ATTACHED]
    chosen = model_kwargs.get("past_key_values") is not None
    named = generation_config.cache_implementation is not None
    if chosen or named or generation_config.use_cache is False:
        original: Callable[..., None] = type(model)._prepare_cache_for_generation
        original(model, generation_config, model_kwargs, *args, **kwargs)
        return
    model_kwargs["past_key_values"] = CompressedCache(attached.plan, attached.params)


def _refuse_generate_batch(*args: Any, **kwargs: Any) -> None:
    raise KVCompressError(
        "generate_batch uses its own paged cache and would run uncompressed; call generate instead"
    )
