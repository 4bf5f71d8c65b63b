"""The cache of a model that has a plan attached."""

from __future__ import annotations

from typing import Any

from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.model.attached import base_of, own_part


def new_cache(model: Any, **options: Any) -> CompressedCache:
    """An empty cache for a model that has a plan attached.

    Args:
        options: `protect` and `compress` of `CompressedCache`.

    Raises:
        KVCompressError: if no plan is attached.
    """
    plan, params = own_part(model)
    plain = all(plan.model.heads_of(layer) for layer in range(plan.model.layers))
    return CompressedCache(plan, params, None if plain else base_of(model).config, **options)
