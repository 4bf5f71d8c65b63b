"""Situations that kvcompress needs steps of its own for."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import common as c
import torch
from common import Record, Setting
from kvcompress_side import (
    PER_HEAD,
    PLANS,
    SIMPLE,
    after_prompt,
    frequent,
    kept_of,
    local,
    per_head,
    start,
    tokens_held,
    window_votes,
)
from torch import Tensor
from transformers import DynamicCache

import kvcompress
from kvcompress.plan import HeadPlan, uniform
from kvcompress.runtime.model.families import shape_of


def storage(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        plan = PLANS[name](model, setting.kept)
        full = DynamicCache()
        c.feed(model, full, ids, bounds[:2])
        cache = start(model, plan)
        c.feed(model, cache, ids, bounds[:2])
        kvcompress.detach(model)
        _, _, kept, error = after_prompt(model, plan, ids, bounds)
        return {
            "kept": c.share(kept[1] or []),
            "bytes": c.storage_bytes(cache),
            "nbytes": cache.nbytes(),
            "full_bytes": c.storage_bytes(full),
            "gap": error,
        }

    return {name: c.measured(one, name) for name in PLANS}


def padding(setting: Setting) -> Record:
    pads, context = setting.context - setting.short_row, setting.context
    ids = c.token_ids(context + setting.steps, batch=2)
    ids[1, :pads] = 2
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    steps = [1] * setting.steps

    def one(name: str) -> Record:
        model = c.build()
        plan = PLANS[name](model, None)
        bounds = c.bounds_of(context, *steps)
        _, logits, kept, _ = after_prompt(model, plan, ids, bounds, mask)
        first = [k for k in kept[1] or [] if k is not None]
        padded = sum(int(k[1, :, :pads].sum()) for k in first)
        real = torch.stack([k[1, :, pads:].sum(-1) for k in first])
        short = after_prompt(model, plan, ids[1:, pads:], c.bounds_of(context - pads, *steps))[1]
        long = after_prompt(model, plan, ids[:1], bounds)[1]
        total = padded + int(real.sum())
        kvcompress.attach(model, plan)
        both = c.generated(model, ids[:, :context], mask[:, :context])
        prompt = ids[1:, pads:context]
        single = c.generated(model, prompt, torch.ones_like(prompt))
        return {
            "generate_gap": c.gap([both[1:]], [single]),
            "pad_share": [padded / total, padded / total],
            "real_kept": [int(real.min()), int(real.max())],
            "visible_next_step": int(real[0, 0]) + 1,
            "short_row_gap": c.gap([x[1:] for x in logits], short),
            "long_row_gap": c.gap([x[:1] for x in logits], long),
        }

    return {name: c.measured(one, name) for name in SIMPLE}


def chunked(setting: Setting) -> Record:
    quarter = setting.context // 4

    def one(name: str, compress: str) -> Record:
        model, ids, bounds = c.standard(setting)
        plan = PLANS[name](model, setting.kept)
        parts = c.bounds_of(*[quarter] * 4, *[1] * setting.steps)
        cache = start(model, plan, compress=compress)
        c.feed(model, cache, ids, parts[:5])
        cache.end_prefill()
        held = tokens_held(cache, setting.context)
        got = c.feed(model, cache, ids, bounds[1:])
        once = start(model, plan)
        c.feed(model, once, ids, bounds[:2])
        difference = c.gap(got, c.feed(model, once, ids, bounds[1:]))
        numbers = {"asked": setting.kept, "tokens": held, "gap_to_one_shot": difference}
        if compress == "per_chunk":
            numbers["gap"] = after_prompt(model, plan, ids, parts)[3]
        return numbers

    return {
        f"{name}, {compress}": c.measured(one, name, compress)
        for name in SIMPLE
        for compress in ("per_chunk", "after_prefill")
    }


def long_generation(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, target = c.build(), setting.long // 2
        heads = {"frequent": frequent(target), "local": local(target)}
        ids = c.token_ids(setting.context // 16 + setting.long)
        bounds = c.bounds_of(setting.context // 16, *[1] * setting.long)
        plan = per_head(model, heads[name])
        cache, _, kept, error = after_prompt(model, plan, ids, bounds)
        most = max(int(k[0].sum(-1).max()) for k in kept[1:] if k and k[0] is not None)
        held = {"most_tokens": most, "bytes": c.storage_bytes(cache)}
        return {"asked": target, **held, "gap": error}

    return {name: c.measured(one, name) for name in ("frequent", "local")}


def stored_keys(cache: Any) -> dict[tuple[int, int, int, int], Tensor]:
    """Key (or its code) of every stored (layer, row, head, position)."""
    found = {}
    for number, layer in enumerate(cache.layers):
        state = layer.state
        for b, row in enumerate(state.exact_position.tolist()):
            for slot, position in enumerate(row):
                for head in range(state.exact_k.shape[1]):
                    found[number, b, head, position] = state.exact_k[b, head, slot].clone()
        for group in state.groups:
            row, head = group.store.segment_of_slot()
            heads = group.index[head].tolist()
            places = zip(row.tolist(), heads, group.store.position.tolist(), strict=True)
            for slot, (b, h, position) in enumerate(places):
                found[number, b, h, position] = group.store.keys.data[slot].clone()
    return {place: key for place, key in found.items() if place[3] >= 0}


def intact(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        cache = start(model, PLANS[name](model, setting.kept))
        c.feed(model, cache, ids, bounds[:2])
        before = stored_keys(cache)
        c.feed(model, cache, ids, bounds[1:3])
        after = stored_keys(cache)
        both = [place for place in before if place in after]
        changed = sum(not torch.equal(before[place], after[place]) for place in both)
        return {
            "changed": changed / len(both),
            "evicted": 1 - len(both) / len(before),
            "largest_key": max(float(k.abs().max()) for k in after.values()),
            "largest_key_before": max(float(k.abs().max()) for k in before.values()),
        }

    return {name: c.measured(one, name) for name in ("window votes", *PER_HEAD)}


def reuse(setting: Setting) -> Record:
    """Two continuations of one compressed prompt, from a copy of its cache."""

    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        cache = start(model, PLANS[name](model, setting.kept))
        c.feed(model, cache, ids, bounds[:2])
        first = c.feed(model, copy.deepcopy(cache), ids, bounds[1:])
        return {"gap": c.gap(c.feed(model, cache, ids, bounds[1:]), first)}

    return {name: c.measured(one, name) for name in ("window votes", *PER_HEAD)}


def save_load(setting: Setting) -> Record:
    """Into a model built anew, with the plan attached again."""

    def one(name: str, positions: bool) -> Record:
        model, ids, bounds = c.standard(setting)
        plan = PLANS[name](model, setting.kept)
        cache = start(model, plan)
        c.feed(model, cache, ids, bounds[:2])
        fresh = c.build()
        kvcompress.attach(fresh, plan)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path)
            size = path.stat().st_size
            loaded = kvcompress.CompressedCache.load(path, fresh)
        expected = c.feed(model, cache, ids, bounds[1:])
        got = c.feed(fresh, loaded, ids, bounds[1:], positions=positions)
        return {"gap": c.gap(got, expected), "bytes": cache.nbytes(), "file_bytes": size}

    return {
        f"{name}, {label}": c.measured(one, name, positions)
        for name in ("window votes", "key norm", "window votes, int8", *PER_HEAD)
        for label, positions in (("position_ids by hand", True), ("no position_ids", False))
    }


def quantized_cache(setting: Setting) -> Record:
    """Without key statistics, which a profile would add."""
    steps = [1] * setting.steps
    models = c.both_models(setting, setting.steps, 512 + setting.steps)

    def one(model: Any, ids: Tensor, context: int, bits: str | None, evict: bool) -> Record:
        bounds = c.bounds_of(context, *steps)
        if bits is None:
            full = DynamicCache()
            c.feed(model, full, ids, bounds[:2])
            return {"bytes": c.storage_bytes(full)}
        dtypes = {"k_dtype": bits, "v_dtype": bits}
        plan, exact = (window_votes(model, context // 2, **x) for x in (dtypes, {}))
        if not evict:
            head = HeadPlan.model_validate({"full": True, **dtypes})
            plan = exact = uniform(shape_of(model.config, model.dtype), head)
        _, _, kept, _ = after_prompt(model, exact, ids, bounds)
        cache = start(model, plan)
        c.feed(model, cache, ids, bounds[:2])
        held, own = c.storage_bytes(cache), kept_of(cache, context)
        logits = c.feed(model, cache, ids, bounds[1:])
        kvcompress.detach(model)
        expected = c.reference(model, ids, bounds, kept)[1:]
        agreement = c.agreement(own, kept[1] or [], range(c.LAYERS))
        return {
            "bytes": held,
            "kept": c.share(own),
            "agreement": agreement,
            "gap": c.gap(logits, expected),
        }

    ways: dict[str, tuple[str | None, bool]] = {"nothing": (None, False)}
    for bits in ("int4", "int8", "fp8"):
        ways |= {bits: (bits, False), f"{bits} + window votes": (bits, True)}
    return {
        f"{way}, {label}": c.measured(one, *given, *options)
        for label, given in models.items()
        for way, options in ways.items()
    }
