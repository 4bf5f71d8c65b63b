"""A cache as tensors and JSON, and back.

Loading builds a cache of the saved layout on the meta device first, from the counters alone. That
cache tells which tensors the file must hold and how its JSON must read. A file that differs is
refused before any tensor is read. `kvcompress.runtime.store.rules` has the rules for counters and
tensors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvcompress.quant.codec import Codes
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.saved.cachefile import CacheFileError, Declared
from kvcompress.runtime.store.rules import COUNTERS, TENSORS, first_broken, fits
from kvcompress.runtime.store.segments import Group, SegmentStore
from kvcompress.runtime.store.state import LayerState

if TYPE_CHECKING:
    from kvcompress.runtime.cache.cache import CompressedCache
    from kvcompress.strict import Json

# fields that are not saved: loading computes them from the plan and the saved capacities
REBUILT: Final[dict[type, frozenset[str]]] = {
    LayerState: frozenset({"settings"}),
    Group: frozenset({"heads", "index", "rules"}),
    SegmentStore: frozenset(
        "kind head_dim value_dim model_dtype device batch_index head_index starts".split()
    ),
    Codes: frozenset(),
}
# what a file keeps of a layer's `Progress`, by the name that it has there
PROGRESS: Final = {"seen": "seen", "record_past": "record_past", "_decoded": "decoded"}
LINEAR_STATES: Final = ("conv_states", "recurrent_states")
Spans = tuple[range, ...] | list[tuple[range, ...]]  # for every row, or row by row
_META: Final = torch.device("meta")


# ---- from a cache to tensors and JSON
def take_cache(cache: CompressedCache, tensors: dict[str, Tensor]) -> dict[str, Json]:
    """The JSON part of a cache; its tensors are put into `tensors`.

    Raises:
        CacheFileError: for a cache that holds a prompt or drafts, or could not be loaded again.
    """
    spans = cache.compressed_layers[0].spans
    return {
        "compress": cache.compress,
        "assists": cache.assists,
        "protect": _take(spans if isinstance(spans, list) else [*spans], "protect", tensors),
        "token_digest": cache.seen_text.to_host(),
        "layers": [
            _take_layer(layer, f"layers.{number}", tensors)
            for number, layer in enumerate(cache.layers)
        ],
    }


def _take_layer(layer: object, name: str, tensors: dict[str, Tensor]) -> Json:
    if isinstance(layer, CompressedLayer):
        layer.check_idle()
        own = {key: getattr(layer.progress, field) for key, field in PROGRESS.items()}
        return {**own, "state": _take(layer.state, f"{name}.state", tensors)}
    if isinstance(layer, LinearAttentionLayer):
        return _take_linear(layer, name, tensors)
    if getattr(layer, "keys", None) is not None:
        raise CacheFileError(f"{name}: a {type(layer).__name__} cannot be saved in a cache file")
    return None


def _take_linear(layer: LinearAttentionLayer, name: str, tensors: dict[str, Tensor]) -> Json:
    """The JSON part of transformers' own layer, whose states have a fixed size."""
    for kind in LINEAR_STATES:
        for index, state in getattr(layer, kind).items():
            if state is not None:
                tensors[f"{name}.{kind}.{index}"] = state
    for index, state in layer.conv_states.items():
        if state is not None and state.shape[-1] != layer.conv_kernel_size[index]:
            raise CacheFileError(
                f"{name}: drafted tokens are not settled; call cache.crop(0) first"
            )
    return {
        "record_past": layer.record_past,
        "previous": list(layer.has_previous_state.values()),
        "kernel": list(layer.conv_kernel_size.values()),
    }


def _take(value: object, name: str, tensors: dict[str, Tensor]) -> Json:
    """The JSON part of `value`; its tensors are put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, range):
        return {"range": [value.start, value.stop]}
    if isinstance(value, list | tuple):
        items = [_take(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if type(value) in REBUILT:
        return {
            field: _take(getattr(value, field), f"{name}.{field}", tensors)
            for field in saved_fields(type(value))
        }
    raise CacheFileError(f"{name}: a {type(value).__name__} cannot be saved in a cache file")


def saved_fields(kind: type) -> list[str]:
    """Fields of a dataclass that a file holds."""
    return [f.name for f in dataclasses.fields(kind) if f.name not in REBUILT[kind]]


# ---- and back
def skeleton(
    cache: CompressedCache,
    host: Json,
    batch: int,
    dtype: torch.dtype,
    linear: Sequence[object],
) -> Declared:
    """Give an empty cache the layout that `host` says, on the meta device.

    Args:
        host: JSON of a file.
        linear: layers of a cache of this model that has seen a token, where transformers' own keep
            a state; else empty.

    Returns:
        The tensors that a file of this layout holds.

    Raises:
        ValueError: naming what is wrong.
    """
    if not fits(host["assists"], bool):
        raise ValueError("its counters have the types that counters have")
    cache.assists = host["assists"]
    for number, (layer, saved) in enumerate(zip(cache.layers, host["layers"], strict=True)):
        if isinstance(layer, CompressedLayer):
            _lay_out(layer, saved, batch, dtype, f"layers.{number}")
        elif isinstance(layer, LinearAttentionLayer):
            like = linear[number]
            assert isinstance(like, LinearAttentionLayer)
            _lay_out_linear(layer, like, batch)
    _agree(cache)
    _check_digest(host["token_digest"], cache.compressed_layers[0].seen, batch)
    cache.seen_text = cache.seen_text.from_host(host["token_digest"])
    tensors: dict[str, Tensor] = {}
    again = take_cache(cache, tensors)
    if json.dumps(again, sort_keys=True) != json.dumps(host, sort_keys=True):
        raise ValueError("its JSON says more or less than its layout")
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def spans_of(host: Json) -> Spans:
    """The protected spans of the saved cache, for all rows or a list with one entry per row."""
    return _plain(host)


def fill(
    cache: CompressedCache,
    planned: CompressedCache,
    tensors: dict[str, Tensor],
    devices: Sequence[torch.device],
) -> None:
    """Make an empty cache what `planned`, a `skeleton`, says, with the tensors of the file.

    Raises:
        ValueError: naming the rule that they break.
    """
    cache.assists, cache.seen_text = planned.assists, planned.seen_text
    for number, (layer, like) in enumerate(zip(cache.layers, planned.layers, strict=True)):
        name = f"layers.{number}"
        if isinstance(layer, CompressedLayer):
            assert isinstance(like, CompressedLayer)
            layer.progress = like.progress
            if like.state is not None:
                _fill_state(layer, like.state, f"{name}.state", tensors, devices[number])
        elif isinstance(layer, LinearAttentionLayer):
            assert isinstance(like, LinearAttentionLayer)
            _fill_linear(layer, like, name, tensors, devices[number])


def _lay_out(
    layer: CompressedLayer, saved: Json, batch: int, dtype: torch.dtype, name: str
) -> None:
    for key, field in PROGRESS.items():
        if not fits(saved[key], type(getattr(layer.progress, field))):
            raise ValueError(f"{name}: its counters have the types that counters have")
        setattr(layer.progress, field, saved[key])
    if saved["state"] is None:
        return
    if len(saved["state"]["row_seen"]) != batch:  # before tensors of so many rows are made
        raise ValueError(f"{name}: not so: each list of its rows has one entry for a row")
    state = _empty_state(layer, batch, dtype, _META, ())
    for field, value in saved["state"].items():
        if not isinstance(getattr(state, field), Tensor | None) and field != "groups":
            setattr(state, field, _plain(value))
    for group, part in zip(state.groups, saved["state"]["groups"], strict=True):
        group.store.capacities = _plain(part["store"]["capacities"])
    reason = first_broken(COUNTERS, state, layer.seen)
    if reason is not None:
        raise ValueError(f"{name}: not so: {reason}")
    for group in state.groups:
        store = group.store
        group.store = SegmentStore(
            *(store.kind, store.head_dim, store.value_dim, store.model_dtype, store.device),
            store.capacities,
        )


def _empty_state(
    layer: CompressedLayer, batch: int, dtype: torch.dtype, device: torch.device, spans: Spans
) -> LayerState:
    """Of a layer that now counts as one that has begun."""
    shape, size = layer.settings.plan.model, (batch, len(layer.settings.heads), 0)
    layer.begin(
        torch.empty(*size, shape.head_dim, dtype=dtype, device=device),
        torch.empty(*size, shape.v_dim, dtype=dtype, device=device),
        spans,  # rows may have moved since the layer's own were given
    )
    if layer.state is None:
        raise ValueError(f"layer {layer.settings.layer} holds its tokens in no segments")
    return layer.state


def _agree(cache: CompressedCache) -> None:
    """Every layer has seen the same tokens."""
    layers = cache.compressed_layers
    rows = [None if layer.state is None else layer.state.row_seen for layer in layers]
    if any(layer.seen != layers[0].seen for layer in layers) or any(r != rows[0] for r in rows):
        raise ValueError("not so: every layer has seen the same tokens")


def _check_digest(host: Json, seen: int, batch: int) -> None:
    tokens, rows = host["tokens"], host["rows"]
    if not fits(tokens, int) or not fits(rows, list[str] | None) or not 0 <= tokens <= seen:
        raise ValueError("not so: the tokens' digest counts tokens that were seen")
    if rows is not None and (len(rows) != (batch if tokens else 0) or {64} < {64, *map(len, rows)}):
        raise ValueError("not so: the tokens' digest has one sha256 for a row")


def _fill_state(
    layer: CompressedLayer,
    like: LayerState,
    name: str,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> None:
    state = _empty_state(layer, like.batch, like.exact_k.dtype, device, list(like.spans))
    for group, planned in zip(state.groups, like.groups, strict=True):
        group.store.place(planned.store.capacities)
    _give(state, like, name, tensors)
    state.grant(state.granted)
    reason = first_broken(TENSORS, state, layer.seen)
    if reason is not None:
        raise ValueError(f"{name}: not so: {reason}")


def _give(now: Any, like: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value that `_take` took, in place where that is possible.

    Args:
        now: what a new cache has in its place.
        like: what a `skeleton` has there.
    """
    if isinstance(like, Tensor):
        return tensors.pop(name).to(now.device)
    if type(like) in REBUILT:
        values = {
            field: _give(getattr(now, field), getattr(like, field), f"{name}.{field}", tensors)
            for field in saved_fields(type(like))
        }
        if isinstance(now, Codes):
            return dataclasses.replace(now, **values)
        for field, value in values.items():
            setattr(now, field, value)
        return now
    if isinstance(like, list) and any(type(item) in REBUILT for item in like):
        pairs = zip(now, like, strict=True)
        return [_give(item, part, f"{name}.{i}", tensors) for i, (item, part) in enumerate(pairs)]
    return like


def _plain(saved: Json) -> Json:
    if isinstance(saved, dict):
        ((kind, items),) = saved.items()
        return range(*items) if kind == "range" else tuple(map(_plain, items))
    return [_plain(item) for item in saved] if isinstance(saved, list) else saved


# ---- states of linear attention
def _lay_out_linear(layer: LinearAttentionLayer, like: LinearAttentionLayer, batch: int) -> None:
    """The states that this model's layers have, of so many rows."""
    for kind in LINEAR_STATES:
        for index, state in getattr(like, kind).items():
            if state is not None:
                shape = (batch, *state.shape[1:])
                getattr(layer, kind)[index] = torch.empty(shape, dtype=state.dtype, device=_META)
    layer.has_previous_state = dict(like.has_previous_state)
    layer.conv_kernel_size = dict(like.conv_kernel_size)
    layer.record_past = False


def _fill_linear(
    layer: LinearAttentionLayer,
    like: LinearAttentionLayer,
    name: str,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> None:
    for index, kernel in like.conv_kernel_size.items():
        conv = tensors.pop(f"{name}.conv_states.{index}", None)
        recurrent = tensors.pop(f"{name}.recurrent_states.{index}", None)
        if any(t is not None and not bool(t.isfinite().all()) for t in (conv, recurrent)):
            raise ValueError(f"{name}: not so: states of linear attention are finite")
        if conv is not None:
            layer.update_conv_state(conv.to(device), index, conv_kernel_size=kernel)
        if recurrent is not None:
            layer.update_recurrent_state(recurrent.to(device), index)
        layer.has_previous_state[index] = like.has_previous_state[index]
    layer.record_past = like.record_past
