"""Keeping a compressed cache: save it, load it, and go on bit for bit.

A file holds every tensor of every layer under ``layers.{i}.state.…``, named as the dataclasses of
`state` and `store` name them, and in its metadata, all of it text:
  identity  format, schema_version, kvcompress, config_hash, plan, params, dtype
  size      batch, tokens
  host      JSON of the counters, lists and layouts that the tensors are read by
A field of a state that is not in `REBUILT` is saved, so that a new one needs nothing here. The
states of linear attention, which transformers' own layers keep, lie under ``layers.{i}``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

import kvcompress
from kvcompress.plan import Plan
from kvcompress.quant.codec import Codes
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime import cachefile
from kvcompress.runtime.cache import CompressedCache
from kvcompress.runtime.cachefile import CacheFileError, damaged
from kvcompress.runtime.layer import CompressedLayer
from kvcompress.runtime.protocol import leaving_plain_tensors
from kvcompress.runtime.state import Group, LayerState
from kvcompress.runtime.store import SegmentStore
from kvcompress.runtime.token_digest import TokenDigest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# fields that the plan and the saved capacities give back
REBUILT: Final[dict[type, frozenset[str]]] = {
    LayerState: frozenset({"settings"}),
    Group: frozenset({"heads", "index", "rules"}),
    SegmentStore: frozenset(
        "kind head_dim value_dim model_dtype device batch_index head_index starts".split()
    ),
    Codes: frozenset(),
}
LAYER_FIELDS: Final = ("seen", "record_past", "_decoded")
LINEAR_STATES: Final = ("conv_states", "recurrent_states")


def save_cache(cache: CompressedCache, path: Path | str) -> None:
    """Write the cache to `path`, replacing a file of that name in one step once it is complete.

    Raises:
        CacheFileError: for a cache that is empty or in the middle of something, or where the file
            cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = _identity(cache)
    metadata["host"] = json.dumps(_take_cache(cache, tensors), separators=(",", ":"))
    cachefile.write(Path(path), metadata, tensors)


@leaving_plain_tensors
def load_cache(
    path: Path | str,
    plan: Plan,
    params: KVParams | None = None,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Sequence[torch.device] = "cpu",
) -> CompressedCache:
    """The cache that `save_cache` wrote, ready to go on.

    Args:
        plan, params: of the model that goes on; the file must have been made with the same.
        config: of the model, where some layers keep something other than keys and values.
        dtype: of the model's keys; None takes what the file holds.
        device: of all layers, or one for each, see `layer_devices`.

    Raises:
        CacheFileError: where the file is missing, damaged, foreign or newer, or was made with
            another model, plan, key constants or dtype.
    """
    path = Path(path)
    metadata, tensors = cachefile.read(
        path, lambda found: _check_identity(path, found, plan, params, dtype)
    )
    if isinstance(device, torch.device | str):
        device = [torch.device(device)] * plan.model.layers
    try:
        host = json.loads(metadata["host"])
        protect = _plain(host["protect"])
        cache = CompressedCache(plan, params, config, protect, host["compress"])
        _give_cache(cache, metadata, host, tensors, device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged(path, f"it does not fit this version: {error}") from None
    return cache


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each attention layer of the model keeps its weights, and so its part of the cache."""
    devices = [model.device] * model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and weight is not None and weight.device.type != "meta":
            devices[index] = weight.device
    return devices


# ---- identity
def plan_hash(plan: Plan) -> str:
    """sha256 of the plan's JSON."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def params_hash(params: KVParams | None) -> str:
    """sha256 over the key constants of every layer, ``none`` without any."""
    if params is None:
        return "none"
    digest = hashlib.sha256()
    trained = [part for name in sorted(params.scorer) for part in params.scorer[name]]
    for tensor in (*params.k_center, *params.k_scale, *trained):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(cachefile.bytes_of(tensor.float()))
    return digest.hexdigest()


def _identity(cache: CompressedCache) -> dict[str, str]:
    if type(cache) is not CompressedCache:
        raise CacheFileError(f"a {type(cache).__name__} cannot be saved; use a CompressedCache")
    states = [layer.state for layer in cache.compressed_layers if layer.state is not None]
    if not states:
        raise CacheFileError("the cache is empty: run the prompt through the model, then save it")
    return {
        "format": cachefile.FORMAT,
        "schema_version": str(cachefile.SCHEMA_VERSION),
        "kvcompress": kvcompress.__version__,
        "config_hash": cache.plan.model.config_hash,
        "plan": plan_hash(cache.plan),
        "params": params_hash(cache.params),
        "dtype": str(states[0].exact_k.dtype).removeprefix("torch."),
        "batch": str(states[0].batch),
        "tokens": str(cache.get_seq_length()),
    }


def _check_identity(
    path: Path,
    found: dict[str, str],
    plan: Plan,
    params: KVParams | None,
    dtype: torch.dtype | None,
) -> None:
    wanted = {
        "config_hash": (plan.model.config_hash, "another model; load that model"),
        "plan": (plan_hash(plan), "another plan; attach the plan that it was made with"),
        "params": (params_hash(params), "other key constants; attach those it was made with"),
    }
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        wanted["dtype"] = (name, "a model of another dtype; load the model in that dtype")
    for key, (want, text) in wanted.items():
        have = found.get(key)
        if have != want:
            raise CacheFileError(
                f"{path}: made with {text} ({key} {str(have)[:12]}, here {want[:12]}), or run the "
                "prompt again"
            )


# ---- from a cache to tensors and JSON
def _take_cache(cache: CompressedCache, tensors: dict[str, Tensor]) -> dict[str, Any]:
    spans = cache.compressed_layers[0]._spans
    return {
        "compress": cache.compress,
        "assists": cache.assists,
        "protect": _take(spans if isinstance(spans, list) else [*spans], "protect", tensors),
        "token_digest": cache.token_digest.to_host(),
        "layers": [
            _take_layer(layer, f"layers.{number}", tensors)
            for number, layer in enumerate(cache.layers)
        ],
    }


def _take_layer(layer: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(layer, CompressedLayer):
        layer.check_idle()
        own = {key: getattr(layer, key) for key in LAYER_FIELDS}
        return {**own, "state": _take(layer.state, f"{name}.state", tensors)}
    if isinstance(layer, LinearAttentionLayer):
        return _take_linear(layer, name, tensors)
    if getattr(layer, "keys", None) is not None:
        raise CacheFileError(f"{name}: a {type(layer).__name__} cannot be saved in a cache file")
    return None


def _take_linear(layer: LinearAttentionLayer, name: str, tensors: dict[str, Tensor]) -> Any:
    """transformers' own layer, whose states are of a fixed size."""
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


def _take(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON holds of `value`; its tensors go to `tensors`."""
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
def _give_cache(
    cache: CompressedCache,
    metadata: dict[str, str],
    host: dict[str, Any],
    tensors: dict[str, Tensor],
    devices: Sequence[torch.device],
) -> None:
    """Fill a new cache."""
    batch, dtype = int(metadata["batch"]), getattr(torch, metadata["dtype"])
    cache.assists = host["assists"]
    cache.token_digest = TokenDigest.from_host(host["token_digest"])
    for number, (layer, saved) in enumerate(zip(cache.layers, host["layers"], strict=True)):
        name = f"layers.{number}"
        if isinstance(layer, CompressedLayer):
            for key in LAYER_FIELDS:
                setattr(layer, key, saved[key])
            if saved["state"] is not None:
                like = torch.empty(batch, 0, dtype=dtype, device=devices[number])
                layer.state = _give_state(layer, saved["state"], f"{name}.state", tensors, like)
        elif isinstance(layer, LinearAttentionLayer):
            _give_linear(layer, saved, name, tensors, devices[number])
    if tensors:
        raise ValueError(f"{next(iter(tensors))} belongs to nothing")


def _give_state(
    layer: CompressedLayer, saved: Any, name: str, tensors: dict[str, Tensor], like: Tensor
) -> LayerState:
    """An empty state of the saved layout, filled; `like` has the batch, dtype and device."""
    shape, size = layer.settings.plan.model, (like.shape[0], len(layer.settings.heads), 0)
    spans, layer._spans = layer._spans, ()  # rows may have moved since they were given
    layer.lazy_initialization(
        like.new_empty(*size, shape.head_dim), like.new_empty(*size, shape.v_dim)
    )
    layer._spans = spans
    assert layer.state is not None
    for group, part in zip(layer.state.groups, saved["groups"], strict=True):
        group.store.relayout(part["store"]["capacities"], [0] * size[0])
    state: LayerState = _give(layer.state, saved, name, tensors)
    return state


def _give_linear(
    layer: LinearAttentionLayer,
    saved: dict[str, Any],
    name: str,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> None:
    for index, (previous, kernel) in enumerate(
        zip(saved["previous"], saved["kernel"], strict=True)
    ):
        conv = tensors.pop(f"{name}.conv_states.{index}", None)
        recurrent = tensors.pop(f"{name}.recurrent_states.{index}", None)
        if conv is not None:
            layer.update_conv_state(conv.to(device), index, conv_kernel_size=kernel)
        if recurrent is not None:
            layer.update_recurrent_state(recurrent.to(device), index)
        layer.has_previous_state[index] = previous
    layer.record_past = saved["record_past"]


def _give(now: Any, saved: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value that `_take` took; `now` is what a new cache has in its place."""
    if isinstance(now, Tensor):
        tensor = tensors.pop(name)
        if (tensor.shape, tensor.dtype) != (now.shape, now.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
        return tensor.to(now.device)
    if type(now) in REBUILT:
        if set(saved) != set(saved_fields(type(now))):
            raise ValueError(f"{name} holds {sorted(saved)}")
        values = {
            field: _give(getattr(now, field), part, f"{name}.{field}", tensors)
            for field, part in saved.items()
        }
        if isinstance(now, Codes):
            return dataclasses.replace(now, **values)
        for field, value in values.items():
            setattr(now, field, value)
        return now
    if isinstance(now, list) and any(type(item) in REBUILT for item in now):
        pairs = zip(now, saved, strict=True)
        return [_give(item, part, f"{name}.{i}", tensors) for i, (item, part) in enumerate(pairs)]
    return _plain(saved)


def _plain(saved: Any) -> Any:
    if isinstance(saved, dict):
        ((kind, items),) = saved.items()
        return range(*items) if kind == "range" else tuple(map(_plain, items))
    return [_plain(item) for item in saved] if isinstance(saved, list) else saved
