"""Attention of one token over a full cache, all layers in turn: what kernel.py times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompress.bench.bandwidth import use_threads
from kvcompress.bench.compressed import fill_compressed
from kvcompress.bench.entries import Entry, Ready, Size, held_bytes
from kvcompress.bench.result import Facts, Kind
from kvcompress.evaluate.quality import weights_bytes
from kvcompress.evaluate.serving import model_shape
from kvcompress.measure import caches
from kvcompress.measure.timing import case_of
from kvcompress.runtime.layer.call import AttentionCall
from speed.model import COMPILED, INT8, NAMES, Models
from speed.plans import Setup, plan_of

PACKED: Final = "queries of a group as rows"
GROUPED: Final = "enable_gqa"


class Shared:
    """Makes something once, for cases that differ in their threads alone."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


def with_threads(threads: int, name: str) -> str:
    return f"{name}, {threads} thread" + ("s" if threads > 1 else "")


def own_layers(models: Models, setup: Setup, size: Size) -> tuple[Shared, str]:
    """A cache of ours under `setup`, and the name of its cases."""
    model = models("float32")
    shape = model_shape(model)

    def make() -> Any:
        pair = caches.random_pair(
            size.batch, shape.kv_heads, size.context_tokens, shape.head_dim, torch.float32
        )
        return fill_compressed(plan_of(shape, setup), None, pair)

    return Shared(make), setup.name


def own_entry(models: Models, made: Shared, setup: Setup, size: Size) -> Entry:
    """Attention over the codes, the new token's storage and the victim's choice included."""
    config = models("float32").config
    name = with_threads(size.threads, setup.name)

    def make() -> Ready:
        cache = made()
        held = held_bytes(cache)
        query, key = _token(config, size, torch.float32)
        scaling = query.shape[-1] ** -0.5

        @torch.inference_mode()
        def step() -> None:
            cache.note_forward(None, 1)
            for layer in cache.compressed_layers:
                stored = layer.update(key.clone(), key)
                layer.forward(AttentionCall(query, *stored, None, scaling))

        step()
        return _ready(name, "ours", step, size, "float32", held, 0, held, setup.name)

    return Entry(name, "ours", make)


def sdpa_pairs(models: Models, dtype: str, size: Size) -> Shared:
    """Keys and values ``[B, Hkv, S, D]`` of every layer, each its own memory."""
    layers, heads, dim = caches.kv_sizes(models("float32").config)

    def make() -> list[tuple[Tensor, Tensor]]:
        pair = caches.random_pair(size.batch, heads, size.context_tokens, dim, NAMES[dtype])
        return [(pair[0].clone(), pair[1].clone()) for _ in range(layers)]

    return Shared(make)


def sdpa_entry(models: Models, made: Shared, dtype: str, grouping: str, size: Size) -> Entry:
    """torch's attention over every token, as a static cache gives it: nothing is stored."""
    config = models("float32").config
    name = with_threads(size.threads, f"sdpa {dtype}, {grouping}")
    kind: Kind = "artefact" if (dtype, grouping) == ("bfloat16", GROUPED) else "peer"

    def make() -> Ready:
        pairs: list[tuple[Tensor, Tensor]] = made()
        query, key = _token(config, size, NAMES[dtype])
        grouped = (
            query if grouping == GROUPED else query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        )

        @torch.inference_mode()
        def step() -> None:
            for k, v in pairs:
                F.scaled_dot_product_attention(grouped, k, v, enable_gqa=grouping == GROUPED)

        step()
        held = sum(k.nbytes + v.nbytes for k, v in pairs)
        return _ready(name, kind, step, size, dtype, held, 0, held)

    return Entry(name, kind, make)


def linears_entry(models: Models, weights: str, size: Size) -> Entry:
    """Every linear layer of the model on one row, the output head included."""
    name = with_threads(size.threads, f"linears {weights}")
    kind: Kind = "ours" if weights in (COMPILED, INT8) else "peer"

    def make() -> Ready:
        model = models(weights)
        dtype = torch.float32 if weights == INT8 else model.dtype
        found = [(module, width_of(module)) for module in linears_of(model)]
        rows = {width: torch.randn(size.batch, width, dtype=dtype) for _, width in found}

        @torch.inference_mode()
        def step() -> None:
            for module, width in found:
                module(rows[width])

        step()
        read = weights_bytes(model)  # the norms are too small to count
        return _ready(name, kind, step, size, weights, 0, read, read)

    return Entry(name, kind, make)


def linears_of(model: Any) -> list[nn.Module]:
    """Modules that multiply by a matrix: the linear layers, in whatever class they are now."""
    projections = [m for n, m in model.named_modules() if n.endswith("_proj")]
    return [*projections, model.get_output_embeddings()]


def width_of(module: Any) -> int:
    width: int = module.in_features
    return width


def _token(config: Any, size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query ``[B, Hq, 1, D]`` and key ``[B, Hkv, 1, D]`` of one token per row."""
    _, heads, dim = caches.kv_sizes(config)
    query = torch.randn(size.batch, config.num_attention_heads, 1, dim).to(dtype)
    return query, torch.randn(size.batch, heads, 1, dim).to(dtype)


def _ready(
    name: str,
    kind: Kind,
    step: Callable[[], None],
    size: Size,
    weights: str,
    kv_bytes: int,
    weights_bytes: int,
    read_bytes: int,
    quality: str | None = None,
) -> Ready:
    facts = Facts(
        name=name, kind=kind, context_tokens=size.context_tokens, batch=size.batch,
        threads=size.threads, weights=weights, fill="synthetic", kv_bytes=kv_bytes,
        weights_bytes=weights_bytes, read_bytes=read_bytes, quality=quality,
    )  # fmt: skip
    return Ready(case_of(name, step, prepare=lambda: use_threads(size.threads)), facts)
