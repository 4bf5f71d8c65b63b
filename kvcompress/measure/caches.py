"""Caches of transformers, filled with random keys and values in place of a prompt, and their bytes.

Imports torch and transformers only, so that environments with another transformers can use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

C = TypeVar("C", bound=Cache)
Pair = tuple[Tensor, Tensor]
_PARTS: Final = ("_data", "_scale", "_shift")  # of a quantizer's tensor without storage


def random_pair(
    batch: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> Pair:
    """Keys and values ``[B, Hkv, T, D]`` of one layer, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads, tokens, head_dim)
    key = torch.randn(shape, generator=generator).to(dtype)
    return key, torch.randn(shape, generator=generator).to(dtype)


def kv_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """(layers, KV heads, head dim) of a configuration with the usual names."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, dim


def fill(cache: C, pair: Pair, layers: int) -> C:
    """Store the same keys and values in every layer, through the cache's own `update`.

    Each layer copies what it is given. Returns the cache.
    """
    for layer in range(layers):
        cache.update(*pair, layer)
    return cache


def dynamic(config: PretrainedConfig, pair: Pair) -> Cache:
    return fill(DynamicCache(config=config), pair, kv_sizes(config)[0])


def static(config: PretrainedConfig, pair: Pair, room_tokens: int) -> Cache:
    """A `StaticCache` with room for `room_tokens` more."""
    length = pair[0].shape[2] + room_tokens
    cache = StaticCache(config=config, max_cache_len=length)
    return fill(cache, pair, kv_sizes(config)[0])


def quantized(config: PretrainedConfig, pair: Pair, backend: str, bits: int | None) -> Cache:
    """See `quantized_empty`."""
    return fill(quantized_empty(config, backend, bits), pair, kv_sizes(config)[0])


def quantized_empty(
    config: PretrainedConfig, backend: str, bits: int | None = None, axis: int | None = None
) -> QuantizedCache:
    """A `QuantizedCache`; what is None is left to transformers' defaults, but for hqq's axis, 1.

    Raises:
        ImportError: if the backend's package is not installed.
        ValueError: for a model, or a release of transformers, that it does not work with.
    """
    if backend == "hqq" and axis is None:
        axis = 1
    given = {"nbits": bits, "axis_key": axis, "axis_value": axis}
    return QuantizedCache(backend, config, **{k: v for k, v in given.items() if v is not None})


def storage_bytes(root: object) -> int:
    """Bytes of every distinct tensor storage that `root` reaches through its attributes.

    A storage counts whole and once, however many tensors are views of it. A tensor that is made of
    others, as a coded one, counts by these; a quantizer's buffers count wherever it keeps them.
    """
    seen: set[int] = set()
    storages: dict[tuple[torch.device, int], int] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner = _inside(value)
        if isinstance(value, Tensor) and not inner:
            storage = value.untyped_storage()
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
        waiting += inner
    return sum(storages.values())


def _inside(value: object) -> list[object]:
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        parts = _PARTS if flatten is None else flatten()[0]
        return [getattr(value, name) for name in parts if hasattr(value, name)]
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, list | tuple | set):
        return [*value]
    if isinstance(value, str | bytes | int | float | type | None):
        return []
    names = (*getattr(value, "__dict__", ()), *getattr(value, "__slots__", ()))
    return [getattr(value, name, None) for name in names]
