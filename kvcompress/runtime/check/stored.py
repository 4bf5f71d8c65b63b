"""What a compressed cache stored of a prompt, beside the keys and values that it was given.

Every token that a layer kept is decoded and compared by itself, so a swapped layer, head or
position shows however far rounding moves the logits behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kvcompress.runtime.check.compare import distance

if TYPE_CHECKING:
    from kvcompress.runtime.cache.cache import CompressedCache
    from kvcompress.runtime.store.segments import Group
    from kvcompress.runtime.store.state import LayerState

Given = Mapping[int, tuple[Tensor, Tensor]]

# largest error of a vector's code as a share of its size, with some room: half a step of 4 bits
# over a group is 0.1 of it, and levels lose the roots of 0.0095, 0.035 and 0.117 of it
CODE_ERROR: Final = {
    **{"model": 0.01, "int8": 0.02, "fp8": 0.06, "int4": 0.25},
    **{"rot4": 0.2, "rot3": 0.35, "rot2": 0.55},
}


def listen(cache: CompressedCache) -> Given:
    """Keys and values ``[B, Hkv, T, D]`` by layer, filled as the model gives them to the cache."""
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(key: Tensor, value: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        given[layer] = (key.clone(), value.clone())
        return type(cache).update(cache, key, value, layer, *rest, **more)

    setattr(cache, "update", update)  # noqa: B010  # a type checker takes methods for fixed
    return given


def stored_problem(cache: CompressedCache, given: Given) -> str | None:
    """The first layer whose keys or values are not those that it was given; None: all are.

    Layers that hold something else, such as latents or positions numbered anew, are left out.

    Args:
        cache: has seen one prompt of one row.
        given: what `listen` heard.
    """
    if not given:
        return "the cache was given no layer's keys and values, so nothing can be compared"
    for number, layer in enumerate(cache.layers):
        state = getattr(layer, "state", None)
        if state is None or number not in given or state.settings.kind not in ("full", "sliding"):
            continue
        if state.settings.relative:
            continue
        key, value = given[number]
        for what, dtype, found, wanted in _pairs(state, (key[0].float(), value[0].float())):
            error = distance(found.float(), wanted)
            if not error <= CODE_ERROR[dtype]:
                return (
                    f"layer {number} stores {what} in {dtype} that differ by {error:.3g} of their "
                    f"size, allowed are {CODE_ERROR[dtype]:g}"
                )
    return None


def _pairs(
    state: LayerState, whole: tuple[Tensor, Tensor]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(keys or values, storage, found, wanted) of the uncoded block and of every bucket."""
    held = state.exact_position[0] >= 0
    place = state.exact_position[0][held].long()
    if place.numel():
        yield "keys", "model", state.exact_k[0][:, held], whole[0][:, place]
        yield "values", "model", state.exact_v[0][:, held], whole[1][:, place]
    for group in state.groups:
        yield from _coded(state, group, whole)


def _coded(
    state: LayerState, group: Group, whole: tuple[Tensor, Tensor]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    center, scale = state.key_constants()
    kind = group.store.kind
    for bucket in group.store.buckets():
        keys, values = group.store.decoded(bucket)
        segment, slot = torch.nonzero(bucket.position >= 0, as_tuple=True)
        if not segment.numel():
            continue
        head, place = group.index[bucket.head][segment], bucket.position[segment, slot].long()
        wanted = (whole[0][head, place] - center[head]) / scale[head]
        yield "keys", kind.k_dtype, keys[segment, slot], wanted
        yield "values", kind.v_dtype, values[segment, slot], whole[1][head, place]
