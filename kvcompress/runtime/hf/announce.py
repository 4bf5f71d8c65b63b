"""Hooks that announce every forward of a model to its cache before the layers run.

A layer raises where it attends for a forward that nobody announced, see
`kvcompress.runtime.layer.layer.AbstractLayer`. So if a release of transformers stops calling the
hooks, the user gets an error and no wrong text.
"""

from __future__ import annotations

import weakref
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.errors import KVCompressError, PlanError
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.generate import RUNNING
from kvcompress.runtime.model.attached import RECORD, Attached
from kvcompress.runtime.names import CACHE, CACHE_NAMES, Arguments, by_keyword

_OTHER_NAMES: Final = tuple(name for name in CACHE_NAMES if name != CACHE)

Call = tuple[tuple[object, ...], Arguments]


def announce(model: PreTrainedModel, args: tuple[object, ...], kwargs: Arguments) -> Call:
    """Forward pre-hook: tell the cache which tokens come, and pass it to the attention function."""
    own: Attached = model.__dict__[RECORD]
    plain = not args and not any(name in kwargs for name in _OTHER_NAMES)
    given = dict(kwargs) if plain else by_keyword(own.arguments, args, kwargs)
    if given.get(CACHE) is None and _wants_a_cache(model, given):
        given[CACHE] = new_cache(model)
    cache = given.get(CACHE)
    if not torch.compiler.is_compiling():  # a compiled step follows a prompt that went this way
        running = RUNNING.get()
        if running is not None:
            running.check_forward(model, cache)
    if not isinstance(cache, CompressedCache):
        return (), given
    ids = given.get("input_ids")
    if ids is not None and not torch.compiler.is_compiling():
        _check_ids(model, cache, ids)
    given["kvc_cache"] = cache
    cache.filled_by = weakref.ref(model)
    shown = ids if ids is not None else given.get("inputs_embeds")
    keep = given.get("logits_to_keep")
    cache.note_forward(
        ids,
        0 if shown is None else shown.shape[1],
        given.get("attention_mask"),
        keep if isinstance(keep, int) else None,
    )
    if cache.plan.positions == "relative":
        given["position_ids"] = _relative_positions(own, cache, shown, given)
    elif cache.needs_rotations and own.rotations is not None:
        for layer in cache.compressed_layers:
            layer.settings.rotation = own.rotations[layer.settings.layer]
    return (), given


def _check_ids(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> None:
    """Refuse tokens that the model has no embedding for, such as another model's tokenizer makes.

    Their lookup would end in an IndexError, or take a GPU down. A decoded token is not checked: it
    comes from the model itself, and reading it would wait for the GPU.

    Raises:
        KVCompressError: naming the first of them.
    """
    if not ids.numel() or (ids.shape[-1] == 1 and cache.compressed_layers[0].seen > 0):
        return
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is None:
        return
    for id_ in (int(ids.min()), int(ids.max())):
        if not 0 <= id_ < known:
            raise KVCompressError(
                f"token {id_} is none of the {known} that the model embeds: the text was tokenized "
                "for another model"
            )


def _wants_a_cache(model: PreTrainedModel, given: Arguments) -> bool:
    """Whether transformers would make a cache of its own, as it does where the caller gives none.

    Not in training: gradients do not flow through the compressed cache.
    """
    use = given.get("use_cache")
    if use is None:
        use = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
    return bool(use) and not model.training


def _relative_positions(
    own: Attached, cache: CompressedCache, shown: Tensor | None, given: Arguments
) -> Tensor:
    """The position ids that the cache wants, in place of the caller's."""
    mask = given.get("attention_mask")
    foreseen = cache.plan.max_position <= own.plan.max_position
    if own.rotations is None or not foreseen:
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
    return cache.relative_positions(own.rotations, batch, length, mask).to(shown.device)


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The innermost modules that know the number of their layer."""
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    return [m for m in found if not any(c in found for c in m.modules() if c is not m)]


def hand_over_input(module: torch.nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Call:
    """Pre-hook of an attention module: give the module's input to its attention function."""
    if "kvc_cache" in kwargs:
        kwargs["kvc_hidden"] = kwargs.get("hidden_states", args[0] if args else None)
    return args, kwargs
