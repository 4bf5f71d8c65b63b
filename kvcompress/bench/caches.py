"""Caches of transformers, filled with random keys and values in place of a prompt.

Imports torch and transformers only, so that environments with another transformers can use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

Pair = tuple[Tensor, Tensor]


def random_pair(
    batch: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> Pair:
    """Keys and values ``[B, Hkv, T, D]`` of one layer, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads, tokens, head_dim)
    key = torch.randn(shape, generator=generator).to(dtype)
    return key, torch.randn(shape, generator=generator).to(dtype)


def kv_sizes(config: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head dim) of a configuration with the usual names."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, dim


def fill(cache: Any, pair: Pair, layers: int) -> Any:
    """Store the same keys and values in every layer, through the cache's own `update`.

    Each layer copies what it is given. Returns the cache.
    """
    for layer in range(layers):
        cache.update(*pair, layer)
    return cache


def dynamic(config: Any, pair: Pair) -> Any:
    return fill(DynamicCache(config=config), pair, kv_sizes(config)[0])


def static(config: Any, pair: Pair, room_tokens: int) -> Any:
    """A `StaticCache` with room for `room_tokens` more."""
    length = pair[0].shape[2] + room_tokens
    cache = StaticCache(config=config, max_cache_len=length)
    return fill(cache, pair, kv_sizes(config)[0])


def quantized(config: Any, pair: Pair, backend: str, bits: int | None) -> Any:
    """See `quantized_empty`."""
    return fill(quantized_empty(config, backend, bits), pair, kv_sizes(config)[0])


def quantized_empty(config: Any, backend: str, bits: int | None) -> Any:
    """A `QuantizedCache` with transformers' defaults; hqq wants its axis said.

    Args:
        bits: None for the fp8 backend.
    """
    options: dict[str, Any] = {} if bits is None else {"nbits": bits}
    if backend == "hqq":
        options |= {"axis_key": 1, "axis_value": 1}
    return QuantizedCache(backend, config, **options)


def storage_bytes(root: Any) -> int:
    """Bytes of every distinct tensor storage that `root` reaches through its attributes.

    A quantizer's buffers are counted wherever it keeps them.
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner = _inside(value)
        if isinstance(value, Tensor) and not inner:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        waiting += inner
    return sum(storages.values())


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Tensor):  # quanto's tensor has no storage, its parts have
        return [getattr(value, n) for n in ("_data", "_scale", "_shift") if hasattr(value, n)]
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, list | tuple | set):
        return [*value]
    if isinstance(value, str | bytes | int | float | type | None):
        return []
    return [*getattr(value, "__dict__", {}).values()]
