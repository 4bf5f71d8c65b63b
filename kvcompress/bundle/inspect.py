"""Bytes, budgets and policies of a plan, for any context and batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.accounting import head_bytes, kv_bytes, layer_shared_bytes, prefill_bytes
from kvcompress.plan import Plan

if TYPE_CHECKING:
    from kvcompress.bundle.manifest import Manifest


@dataclass(frozen=True)
class HeadRow:
    """One KV head; `head` is None for what the heads of a layer share."""

    layer: int
    head: int | None
    keeps: str
    storage: str
    cache_bytes: int
    share_of_bf16: float


@dataclass(frozen=True)
class Inspection:
    """What a plan costs at one context and batch, as `cache.nbytes()` will measure it.

    Attributes:
        prefill_bytes: full keys and values of the one layer that a prompt holds for a moment.
        weights_format, weights_bytes: of a bundle; None for a plan or profile.
        heads: their bytes add up to `kv_cache_bytes`.
    """

    path: str
    model_type: str
    target: str
    context_tokens: int
    batch: int
    sink_tokens: int
    recent_tokens: int
    scorer: str
    kv_cache_bytes: int
    bf16_kv_cache_bytes: int
    keep_ratio: float
    prefill_bytes: int
    weights_format: str | None
    weights_bytes: int | None
    heads: tuple[HeadRow, ...]


def inspect(path: Path | str, context_tokens: int | None = None, batch: int = 1) -> Inspection:
    """Describe a bundle, a profile directory or a plan file.

    Args:
        context_tokens: None is the longest for which the plan was made.

    Raises:
        BundleError: for a bundle that fails its checks.
        PlanError: for anything that holds no plan.
    """
    from kvcompress.bundle.manifest import is_bundle

    if is_bundle(path):
        from kvcompress.bundle.read import open_bundle  # imports torch, which a plan can do without

        bundle = open_bundle(path)
        return describe(path, bundle.plan, context_tokens, batch, bundle.manifest)
    return describe(path, Plan.load(path), context_tokens, batch, None)


def describe(
    path: Path | str,
    plan: Plan,
    context_tokens: int | None,
    batch: int,
    manifest: Manifest | None,
) -> Inspection:
    """`inspect` of a plan in memory."""
    context_tokens = context_tokens or plan.max_position
    held = kv_bytes(plan, context_tokens, batch)
    full = plan.model.bf16_kv_bytes(context_tokens, batch)
    return Inspection(
        path=str(path),
        model_type=plan.model.model_type,
        target=plan.target,
        context_tokens=context_tokens,
        batch=batch,
        sink_tokens=plan.sink_tokens,
        recent_tokens=plan.recent_tokens,
        scorer=plan.scorer,
        kv_cache_bytes=held,
        bf16_kv_cache_bytes=full,
        keep_ratio=held / full,
        prefill_bytes=prefill_bytes(plan.model, context_tokens, batch),
        weights_format=manifest.weights.format if manifest else None,
        weights_bytes=manifest.weights.size_bytes if manifest else None,
        heads=tuple(_rows(plan, context_tokens, batch)),
    )


def _rows(plan: Plan, context_tokens: int, batch: int) -> list[HeadRow]:
    rows = []
    for layer, heads in enumerate(plan.heads):
        window = plan.model.sliding_windows[layer]
        seen = min(context_tokens, window or context_tokens)
        full = batch * seen * 4 * plan.model.head_dim  # K and V of one head in 16 bits
        for index, head in enumerate(heads):
            held = head_bytes(plan, layer, index, context_tokens, batch)
            rows.append(HeadRow(layer, index, head.label, head.storage, held, held / full))
        shared = layer_shared_bytes(plan, layer, batch)
        rows.append(HeadRow(layer, None, "shared", "-", shared, shared / (full * len(heads))))
    return rows
