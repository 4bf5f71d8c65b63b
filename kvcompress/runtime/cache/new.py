"""The cache of a model that has a plan attached."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress.runtime.cache.cache import Compress, CompressedCache
from kvcompress.runtime.cache.spans import Span
from kvcompress.runtime.model.attached import base_of, own_part


def new_cache(
    model: object,
    *,
    protect: Sequence[Span] | Sequence[Sequence[Span]] = (),
    compress: Compress = "per_chunk",
) -> CompressedCache:
    """An empty cache for a model that has a plan attached.

    Args:
        protect, compress: see `CompressedCache`.

    Raises:
        KVCompressError: if no plan is attached.
    """
    plan, params = own_part(model)
    plain = all(plan.model.heads_of(layer) for layer in range(plan.model.layers))
    config = None if plain else base_of(model).config
    return CompressedCache(plan, params, config, protect, compress)
