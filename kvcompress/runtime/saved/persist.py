"""Saving a compressed cache and loading it again, so that it goes on bit for bit.

A file holds every tensor of every layer under ``layers.{i}.state.…``, named as the dataclasses of
`store.state` and `store.segments` name them, and in its metadata, all of it text:
  identity  format, schema_version, kvcompress, config_hash, plan, params, dtype, weights
  size      batch, tokens
  host      JSON of the counters, lists and layouts that the tensors are read by, see `contents`
Every field of a state is saved unless `contents.REBUILT` lists it. A new field therefore needs no
change here, but a rule in `store.rules`. The states of linear attention, which transformers' own
layers keep, lie under ``layers.{i}``.

The digest finds accidents and no attackers, who can compute a digest too. So every value of a file
is checked by `store.rules` before it is used.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

import kvcompress
from kvcompress import strict
from kvcompress.errors import KVCompressError
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.model.attached import base_of
from kvcompress.runtime.model.weights import weights_digest
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.saved import cachefile, contents
from kvcompress.runtime.saved.cachefile import CacheFileError, Declared, damaged
from kvcompress.runtime.store.rules import broken
from kvcompress.runtime.torch_modes import leaving_plain_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcompress.runtime.cache.cache import CompressedCache


def save_cache(cache: CompressedCache, path: Path | str) -> None:
    """Write the cache to `path`, replacing a file of that name in one step once it is complete.

    Raises:
        CacheFileError: for a cache that is empty, in the middle of something, or could not be
            loaded again; whose model is gone; or where the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    host = contents.take_cache(cache, tensors)
    metadata = _identity(cache)
    for layer in cache.compressed_layers:
        reason = None if layer.state is None else broken(layer.state, layer.seen)
        if reason is not None:
            raise CacheFileError(
                f"layer {layer.settings.layer} cannot be saved, not so: {reason}; where the model "
                "computed NaN or infinity, its answers are of no use either"
            )
    metadata["host"] = json.dumps(host, separators=(",", ":"))
    metadata["weights"] = _weights(cache)
    cachefile.write(Path(path), metadata, tensors)


@leaving_plain_tensors
def load_cache(
    kind: type[CompressedCache],
    path: Path | str,
    plan: Plan,
    params: KVParams | None = None,
    *,
    model: PreTrainedModel | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Sequence[torch.device] = "cpu",
) -> CompressedCache:
    """The cache that `save_cache` wrote, ready to go on.

    Args:
        kind: of the cache; the class itself, as a cache knows this module.
        plan, params: of the model that goes on; the file must have been made with the same.
        model: that goes on; its dtype and weights must be those that filled the cache. None
            compares neither, and serves no layers that keep something other than keys and values.
        dtype: of the model's keys, where no model is given; None takes what the file holds.
        device: of all layers, or one for each, see `kvcompress.runtime.model.parallel`.

    Raises:
        CacheFileError: where the file is missing, damaged, foreign or newer, or was made with
            another model, plan, key constants, dtype or weights.
    """
    path = Path(path)
    if isinstance(device, torch.device | str):
        device = [torch.device(device)] * plan.model.layers
    model = None if model is None else base_of(model)
    config = None if model is None else model.config
    dtype = dtype if model is None else model.dtype
    planned: list[CompressedCache] = []

    def new(host: strict.Json) -> CompressedCache:
        spans = contents.spans_of(host["protect"])
        return kind(plan, params, config, spans, host["compress"])

    def accept(found: dict[str, str], declared: Declared) -> None:
        _check_identity(path, found, plan, params, dtype)
        host = strict.load_json(found["host"])
        cache = new(host)
        linear = _linear_layers(cache, model)
        batch, own = cachefile.number(found["batch"]), _dtype(found["dtype"])
        _compare(contents.skeleton(cache, host, batch, own, linear), declared)
        if {**_identity(cache), "kvcompress": found["kvcompress"]} != _named(found):
            raise ValueError("its metadata do not fit its counters")
        if model is not None and found["weights"] != weights_digest(model):
            raise CacheFileError(
                f"{path}: made with other weights than the model has now, adapters included; load "
                "those that it was made with, or run the prompt again"
            )
        planned.append(cache)

    try:
        metadata, tensors = cachefile.read(path, accept)
        cache = new(strict.load_json(metadata["host"]))
        contents.fill(cache, planned[0], tensors, device)
    except CacheFileError:
        raise
    except (KVCompressError, *_UNFIT) as error:
        raise damaged(path, f"{str(error)[:200]!r}") from None
    cache.filled_by = None if model is None else weakref.ref(model)
    return cache


# errors that counters of a wrong kind may cause before a rule refuses them
_UNFIT = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


def _named(found: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in found.items() if k not in ("sha256", "host", "weights")}


def _compare(wanted: Declared, declared: Declared) -> None:
    for name, own in wanted.items():
        if declared.get(name) != own:
            raise ValueError(f"{name} is {declared.get(name)}, not {own}")
    extra = sorted(set(declared) - set(wanted))
    if extra:
        raise ValueError(f"{extra[0]} belongs to nothing")


def _dtype(name: str) -> torch.dtype:
    known = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16)}
    return known[name]


def _linear_layers(cache: CompressedCache, model: PreTrainedModel | None) -> Sequence[object]:
    """The layers of a cache of one token, where some are transformers' own: only a forward tells
    what states theirs have."""
    if model is None or not any(isinstance(own, LinearAttentionLayer) for own in cache.layers):
        return ()
    seen = type(cache)(cache.plan, cache.params, model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), **as_argument(seen))
    return seen.layers


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
    moments = [part for own in params.moments for part in own.tensors()]
    for tensor in (*params.k_center, *params.k_scale, *trained, *moments):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(cachefile.bytes_of(tensor.float()))
    return digest.hexdigest()


def _identity(cache: CompressedCache) -> dict[str, str]:
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


def _weights(cache: CompressedCache) -> str:
    """`weights_digest` of the model that filled the cache."""
    model = None if cache.filled_by is None else cache.filled_by()
    if model is None:
        raise CacheFileError(
            "the model that filled the cache is gone, and a file names its weights: save the cache "
            "while the model is there"
        )
    return weights_digest(model)


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
            shown = ascii(str(have))[1:-1][:12]
            raise CacheFileError(
                f"{path}: made with {text} ({key} {shown}, here {want[:12]}), or run the prompt "
                "again"
            )
