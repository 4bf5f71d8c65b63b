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
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams, Rotation
from kvcompress.runtime.cache import CompressedCache
from kvcompress.runtime.eager import eager_attention
from kvcompress.runtime.evidence import Evidence
from kvcompress.runtime.families import refuse_what_cannot_generate, shape_of
from kvcompress.runtime.layer import CompressedLayer
from kvcompress.runtime.parallel import mesh_of, shard_params, shard_plan
from kvcompress.runtime.relative import serving_rotations
from kvcompress.runtime.static import StaticCompressedCache

IMPLEMENTATION: Final = "kvcompress"
_ATTACHED: Final = "_kvcompress_attached"


class _Attached:
    """What `attach` changed on a model, so that `detach` can undo it."""

    def __init__(self, plan: Plan, params: KVParams | None, before: str) -> None:
        self.plan, self.params, self.before = plan, params, before
        self.own = (plan, params)  # the part of this process, see `own_part`
        self.hook: Any = None
        self.rotations: tuple[Rotation | None, ...] | None = None
        self.hidden_hooks: list[Any] = []

    def remove_hooks(self) -> None:
        for hook in (self.hook, *self.hidden_hooks):
            hook.remove()


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
    needs = scorer(plan.scorer).needs
    turns = plan.positions == "relative" or "rotation" in needs
    rotations = serving_rotations(model, plan) if turns else None
    rank, size = mesh_of(model, device_mesh)
    own = shard_plan(plan, rank, size), shard_params(params, rank, size)
    attached: _Attached | None = model.__dict__.get(_ATTACHED)
    if attached is not None:
        detach(model)
    _register()
    attached = _Attached(plan, params, model.config._attn_implementation or "sdpa")
    attached.own, attached.rotations = own, rotations
    model.set_attn_implementation(IMPLEMENTATION)
    attached.hook = model.register_forward_pre_hook(_note_forward, with_kwargs=True)
    if "hidden" in needs:
        attached.hidden_hooks = [
            module.register_forward_pre_hook(_hand_over_input, with_kwargs=True)
            for module in _attention_modules(model)
        ]
    model.__dict__[_ATTACHED] = attached
    model.__dict__["_prepare_cache_for_generation"] = types.MethodType(_prepare_cache, model)
    model.__dict__["_prefill"] = types.MethodType(_prefill, model)
    model.__dict__["generate_batch"] = _refuse_generate_batch
    return model


def new_cache(model: PreTrainedModel, **options: Any) -> CompressedCache:
    """An empty cache for a model that has a plan attached.

    Args:
        options: `protect` and `compress` of `CompressedCache`.

    Raises:
        KVCompressError: if no plan is attached.
    """
    plan, params = own_part(model)
    plain = all(plan.model.heads_of(layer) for layer in range(plan.model.layers))
    return CompressedCache(plan, params, None if plain else model.config, **options)


def own_part(model: PreTrainedModel) -> tuple[Plan, KVParams | None]:
    """The plan and key constants of the KV heads that this process holds; caches are made of them.

    Raises:
        KVCompressError: if no plan is attached.
    """
    found: _Attached | None = model.__dict__.get(_ATTACHED)
    if found is None:
        raise KVCompressError(
            f"{type(model).__name__} has no plan: call kvcompress.attach(model, plan) first"
        )
    return found.own


def device_mesh(model: PreTrainedModel) -> Any:
    """The `DeviceMesh` over which transformers spread the model, None for one process."""
    return getattr(model, "_device_mesh", None)


def check(model: PreTrainedModel) -> None:
    """Refuse a model that the runtime would serve wrongly.

    Raises:
        UnsupportedModelError: naming the model and the reason.
    """
    shape_of(model.config)
    refuse_what_cannot_generate(model)
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention bypasses transformers' attention interface, so "
            "the compressed cache would never be read and the output would be wrong"
        )


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; the model is transformers' own again."""
    attached: _Attached | None = model.__dict__.pop(_ATTACHED, None)
    if attached is not None:
        attached.remove_hooks()
        for name in ("_prepare_cache_for_generation", "_prefill", "generate_batch"):
            model.__dict__.pop(name, None)
        model.set_attn_implementation(attached.before)
    return model


def attached(model: PreTrainedModel) -> tuple[Plan, KVParams | None] | None:
    """The plan and key constants that the model serves now, None without any."""
    found: _Attached | None = model.__dict__.get(_ATTACHED)
    return None if found is None else (found.plan, found.params)


def _check_plan(model: PreTrainedModel, plan: Plan) -> None:
    shape = shape_of(model.config, model.dtype)
    for name in (
        *("config_hash", "layers", "kv_heads", "head_dim", "value_dim", "sliding_windows"),
        *("layer_kinds", "kv_sources"),
    ):
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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; see `CompressedLayer.forward`."""
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
        reader = cast(int, module.layer_idx)
        if layer.settings.scorer.needs and reader == layer.settings.layer:
            layer.evidence = Evidence(module, hidden)
        kernel = fast if plain else None

        def compressed() -> Tensor:
            return layer.forward(
                query, key, value, attention_mask, scaling, softcap, kernel, s_aux, reader
            )

        return _without_gradient(compressed, query), None
    if plain:
        return fast(), None
    return eager_attention(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _without_gradient(attend: Callable[[], Tensor], query: Tensor) -> Tensor:
    """What is stored belongs to no graph: outside of no_grad the output refuses a gradient."""
    if not (torch.is_grad_enabled() and query.requires_grad):
        return attend()
    with torch.no_grad():
        out = attend()
    return cast(Tensor, _NoGradient.apply(out, query))


class _NoGradient(torch.autograd.Function):
    """Hands its first input on; a backward pass through it is an error, never a silent zero."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise KVCompressError(
            "no gradient flows through the compressed cache; train with use_cache=False"
        )


def _layer_of(module: Any, key: Tensor, cache: Any) -> CompressedLayer | None:
    """The cache layer that holds these keys: they carry it, unless the model made them anew."""
    layer = getattr(key, "_kvc_layer", None)
    if layer is None and isinstance(cache, CompressedCache):
        layer = cache.layers[module.layer_idx]
    return layer if isinstance(layer, CompressedLayer) else None


def _note_forward(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the cache learns what comes, the attention function learns the cache."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, CompressedCache):
        kwargs["kvc_cache"] = cache
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None and args else ids
        shown = ids if ids is not None else kwargs.get("inputs_embeds")
        keep = kwargs.get("logits_to_keep")
        cache.note_forward(
            ids,
            0 if shown is None else shown.shape[1],
            kwargs.get("attention_mask"),
            keep if isinstance(keep, int) else None,
        )
        if cache.plan.positions == "relative":
            kwargs["position_ids"] = _relative_positions(model, cache, shown, kwargs)
        elif cache.needs_rotations:
            _set_rotations(model, cache)
    return args, kwargs


def _set_rotations(model: Any, cache: CompressedCache) -> None:
    attached: _Attached = model.__dict__[_ATTACHED]
    for layer in cache.compressed_layers:
        if attached.rotations is not None:
            layer.settings.rotation = attached.rotations[layer.settings.layer]


def _attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The innermost modules that know the number of their layer."""
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    return [m for m in found if not any(c in found for c in m.modules() if c is not m)]


def _hand_over_input(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of an attention module: its attention function learns the module's input."""
    if "kvc_cache" in kwargs:
        kwargs["kvc_hidden"] = kwargs.get("hidden_states", args[0] if args else None)
    return args, kwargs


def _relative_positions(
    model: Any, cache: CompressedCache, shown: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """The position ids that the cache wants, in place of the caller's."""
    attached: _Attached = model.__dict__[_ATTACHED]
    rotations, mask = attached.rotations, kwargs.get("attention_mask")
    if rotations is None or cache.plan.max_position > attached.plan.max_position:
        raise PlanError(
            "the cache has relative positions that the attached plan does not foresee; call "
            "kvcompress.attach(model, cache.plan)"
        )
    if shown is None or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        raise KVCompressError(
            "relative positions need input_ids or inputs_embeds, and the usual 2-dimensional "
            "attention_mask if any"
        )
    batch, length = shown.shape[:2]
    return cache.relative_positions(rotations, batch, length, mask).to(shown.device)


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """`generate` asks for a cache: ours, unless the caller chose one."""
    given = model_kwargs.get("past_key_values")
    chosen = given is not None
    if isinstance(given, StaticCompressedCache):
        given.check_length(generation_config.max_length - 1)  # the last token is not fed back
    named = generation_config.cache_implementation
    if named is not None and "offloaded" in named:
        raise KVCompressError(
            f"cache_implementation={named!r} would move an uncompressed cache to the host; drop "
            "it to use the compressed cache, or call kvcompress.detach(model) first"
        )
    if chosen or named is not None or generation_config.use_cache is False:
        original: Callable[..., None] = type(model)._prepare_cache_for_generation
        original(model, generation_config, model_kwargs, *args, **kwargs)
        return
    cache = new_cache(model)
    if getattr(generation_config, "is_assistant", False):
        cache.assists = True
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache


def _prefill(
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`generate` feeds the prompt, at once or in chunks: the cache learns where it ends."""
    cache = model_kwargs.get("past_key_values")
    original: Callable[..., Any] = type(model)._prefill
    if not isinstance(cache, CompressedCache):
        return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    _check_text(cache, input_ids, model_kwargs.get("attention_mask"))
    cache.begin_prefill()
    out = original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    cache.finish_prompt(model)
    return out


def _check_text(cache: CompressedCache, input_ids: Tensor, mask: Tensor | None) -> None:
    """A prompt that begins with what the cache holds must be the text that it was made from."""
    seen = cache.get_seq_length()
    only_new = mask is not None and mask.shape[1] > input_ids.shape[1]
    if not seen or only_new or cache.assists or cache.token_digest.rows is None:
        return
    if input_ids.shape[1] == seen:
        raise KVCompressError(
            f"the cache has seen all {seen} tokens of this prompt already, so there is nothing to "
            "feed; pass the prompt with what follows it, or call cache.reset()"
        )
    if input_ids.shape[1] > seen:
        cache.check_prefix(input_ids)


def _refuse_generate_batch(*args: Any, **kwargs: Any) -> None:
    raise KVCompressError(
        "generate_batch uses its own paged cache and would run uncompressed; call generate instead"
    )
