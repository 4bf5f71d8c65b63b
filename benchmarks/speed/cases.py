"""The decode cases of one context and batch: ours, transformers' own, and rivals in processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvcompress.accounting import kv_bytes
from kvcompress.bench.entries import Entry, Size, compressed_holder, dynamic_holder, entry_of
from kvcompress.bench.result import Missing
from kvcompress.bench.run import GQA_DETAIL, PEERS
from kvcompress.evaluate.serving import model_shape
from kvcompress.measure.caches import kv_sizes
from speed.model import COMPILED, INT8, Models, kernels_missing
from speed.plans import PLANNED, Chosen, plan_for, setups
from speed.workers import Pythons, kvpress_entry, quantized_entry, untuned_entry, vllm_entry

LIMIT_TOKENS: Final = 32
# with every format of weights; the other storages with float32 alone
MAIN: Final[tuple[Chosen, ...]] = (*setups((("int8", "int8"),)), PLANNED)
OTHERS: Final[tuple[Chosen, ...]] = tuple(
    setups((("int8", "int4"), ("int4", "int4"), ("fp8", "fp8"), ("model", "model")))
)
_HQQ_MOST_TOKENS: Final = 4096  # it takes minutes to quantize more


@dataclass(frozen=True, slots=True)
class Place:
    """One cell: context and batch."""

    context_tokens: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.context_tokens} tokens, batch {self.batch}"


def places(text: str) -> list[Place]:
    """``4096x1,1024x8``: contexts and batches.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    found = []
    for word in text.split(","):
        context, cross, batch = word.strip().partition("x")
        if not (cross and context.isdigit() and batch.isdigit() and int(context) and int(batch)):
            raise argparse.ArgumentTypeError(f"{word!r}: write CONTEXTxBATCH, like 4096x1")
        found.append(Place(int(context), int(batch)))
    return found


def own_name(setup: Chosen, weights: str) -> str:
    """``int8 20 %, bfloat16``; int8 weights are said in full."""
    return f"{setup.name}, {weights}" + (" weights" if weights == INT8 else "")


def own_entries(
    models: Models, size: Size, wanted: Sequence[tuple[Chosen, str]]
) -> list[Entry | Missing]:
    """Entries of ours for each (setup, weights)."""
    made: list[Entry | Missing] = []
    for setup, weights in wanted:
        name, reason = own_name(setup, weights), kernels_missing(weights)
        if reason is not None:
            made.append(Missing(name=name, reason=reason))
            continue
        model = models(weights)
        plan = plan_for(model_shape(model), setup)
        needs_bytes = 2 * kv_bytes(plan, size.context_tokens, size.batch)
        made.append(
            entry_of(
                name, "ours", model, compressed_holder(model, plan), size, weights=weights,
                quality=setup.name, needs_bytes=needs_bytes,
            )
        )  # fmt: skip
    return made


def sorted_out(found: Sequence[Entry | Missing]) -> tuple[list[Entry], list[Missing]]:
    """What can be timed, and what cannot."""
    made = [each for each in found if isinstance(each, Entry)]
    return made, [each for each in found if isinstance(each, Missing)]


def all_own() -> list[tuple[Chosen, str]]:
    formats = ("float32", "bfloat16", COMPILED, INT8)
    main = [(setup, weights) for weights in formats for setup in MAIN]
    return main + [(setup, "float32") for setup in OTHERS]


def transformers_entry(models: Models, cache: str, weights: str, size: Size) -> Entry | Missing:
    """One of `PEERS` for a model with such weights."""
    words, holder = PEERS[cache]
    name = f"{words} {weights}" + (" weights" if weights == INT8 else "")
    reason = kernels_missing(weights)
    if reason is not None:
        return Missing(name=name, reason=reason)
    model = models(weights)
    artefact = cache == "dynamic" and weights == "bfloat16"
    return entry_of(
        name,
        "artefact" if artefact else "peer",
        model,
        holder(model.config),
        size,
        weights=weights,
        detail=GQA_DETAIL if artefact else "",
        needs_bytes=2 * full_bytes(model, size),
    )


def limit_entry(models: Models, weights: str, size: Size) -> Entry | Missing:
    """The model with next to no cache to read."""
    name = f"no cache to read, {weights}" + (" weights" if weights == INT8 else "")
    reason = kernels_missing(weights)
    if reason is not None:
        return Missing(name=name, reason=reason)
    model = models(weights)
    short = Size(LIMIT_TOKENS, size.batch, size.room_tokens, size.threads)
    return entry_of(
        name, "limit", model, dynamic_holder(model.config), short, weights=weights,
        detail=f"DynamicCache that starts with {LIMIT_TOKENS} tokens",
    )  # fmt: skip


def full_bytes(model: Any, size: Size) -> int:
    """Of keys and values of every token in the model's dtype, before any is cached."""
    layers, heads, dim = kv_sizes(model.config)
    tokens = size.context_tokens + size.room_tokens
    return 2 * layers * heads * dim * tokens * size.batch * model.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Rivals:
    """Which rivals run, and where.

    Attributes:
        folder: of the saved model, for vLLM.
        prompts: cells in which rivals that have to read a real prompt take part.
    """

    pythons: Pythons
    folder: Path
    prompts: tuple[Place, ...]


def decode_entries(
    models: Models, place: Place, size: Size, rivals: Rivals | None
) -> tuple[list[Entry], list[Missing]]:
    """Every case of one cell."""
    asked: list[Entry | Missing] = [
        transformers_entry(models, "dynamic", "float32", size),
        transformers_entry(models, "dynamic", "bfloat16", size),
        transformers_entry(models, "static", "float32", size),
        transformers_entry(models, "static", "bfloat16", size),
        transformers_entry(models, "static", COMPILED, size),
        transformers_entry(models, "static", INT8, size),
        transformers_entry(models, "quantized-fp8", "float32", size),
        *(limit_entry(models, w, size) for w in ("float32", "bfloat16", COMPILED, INT8)),
    ]
    offloaded = "it moves layers between a GPU and the host, and there is no GPU"
    asked += own_entries(models, size, all_own())
    made, missing = sorted_out([*asked, Missing(name="OffloadedCache", reason=offloaded)])
    if rivals is not None:
        made += rival_entries(models, place, size, rivals, missing)
    return made, missing


def rival_entries(
    models: Models, place: Place, size: Size, rivals: Rivals, missing: list[Missing]
) -> list[Entry]:
    """Cases in processes of their own; what cannot run here is added to `missing`."""
    made = [
        untuned_entry(models, size),
        quantized_entry(models, rivals.pythons, "quanto", 4, size),
    ]
    if place.context_tokens <= _HQQ_MOST_TOKENS:
        made.append(quantized_entry(models, rivals.pythons, "hqq", 4, size))
    else:
        reason = f"quantizing more than {_HQQ_MOST_TOKENS} tokens takes it minutes"
        missing.append(Missing(name="QuantizedCache hqq int4", reason=reason))
    reads = [
        kvpress_entry(models, rivals.pythons, "SnapKV", size),
        kvpress_entry(models, rivals.pythons, "AdaKV", size),
        vllm_entry(models, rivals.pythons, rivals.folder, size),
    ]
    if place in rivals.prompts:
        return made + reads
    reason = "reads a real prompt, which this cell leaves out"
    missing += [Missing(name=entry.name, reason=reason) for entry in reads]
    return made
