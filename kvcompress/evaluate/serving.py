"""What every measurement needs of a model: caches that it serves, their bytes, its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvcompress.accounting import kv_bytes
from kvcompress.plan import ModelShape, Plan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from kvcompress.quant.keystats import KVParams


@contextmanager
def serving(
    model: PreTrainedModel, plan: Plan | None, params: KVParams | None
) -> Iterator[Callable[[], Cache]]:
    """A factory of caches that `model` serves inside the block; then it is as it was.

    Args:
        plan: None for transformers' DynamicCache.
    """
    from kvcompress.runtime.cache.new import new_cache
    from kvcompress.runtime.hf.attach import attach, detach
    from kvcompress.runtime.model.attached import attached

    before = attached(model)
    detach(model)
    was_training = model.training
    model.eval()
    try:
        if plan is None:
            from transformers import DynamicCache

            yield lambda: DynamicCache(config=model.config)
        else:
            attach(model, plan, params)
            yield lambda: new_cache(model)
    finally:
        detach(model)
        if before is not None:
            attach(model, *before)
        model.train(was_training)


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor that `cache` holds; for transformers' caches their keys and values."""
    own = getattr(cache, "nbytes", None)
    if callable(own):
        return int(own())
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def host_bytes(cache: Cache) -> int:
    """Bytes of host memory that a recall tier of `cache` holds beside them."""
    own = getattr(cache, "host_nbytes", None)
    return int(own()) if callable(own) else 0


def model_shape(model: PreTrainedModel) -> ModelShape:
    from kvcompress.runtime.model.families import shape_of

    return shape_of(model.config, model.dtype)


def wider_weight_bytes(model: PreTrainedModel) -> int:
    """What the weights take beyond what they take in the dtype of the model's files."""
    from kvcompress.checkpoint.compute import stored_dtype

    computed = [weight.numel() for weight in model.parameters() if weight.dtype == model.dtype]
    return sum(computed) * (model.dtype.itemsize - stored_dtype(model).itemsize)


def wider_bytes(model: PreTrainedModel, plan: Plan | None, tokens: int) -> int:
    """What a row of `tokens` holds beyond what it would hold in the dtype of the model's files.

    A compressed cache differs in sinks and recent tokens alone.
    """
    from kvcompress.checkpoint.compute import stored_dtype

    wide, saved = model.dtype.itemsize, stored_dtype(model).itemsize
    if wide == saved:
        return 0
    if plan is None:
        full = model_shape(model).bf16_kv_bytes(tokens, 1)
        return full * (wide - saved) // 2
    shapes = [plan.model.model_copy(update={"model_dtype_bytes": size}) for size in (wide, saved)]
    held = [kv_bytes(plan.model_copy(update={"model": each}), tokens, 1) for each in shapes]
    return held[0] - held[1]
