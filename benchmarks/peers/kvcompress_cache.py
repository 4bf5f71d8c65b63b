"""Situations on kvcompress: what its cache holds and how it stands use."""

from __future__ import annotations

import copy
from typing import Any

import common as c
import torch
from common import Record, Setting
from kvcompress_helpers import (
    PER_HEAD,
    PLANS,
    SIMPLE,
    after_prompt,
    frequent,
    local,
    per_head,
    standard,
    start,
    tokens_held,
)
from torch import Tensor
from transformers import DynamicCache

import kvcompress
from kvcompress.runtime.model.families import shape_of


def storage(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
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


def per_layer(setting: Setting) -> Record:
    ways = {"1-token steps": [1] * setting.steps, "question": [setting.question, 1, 1]}

    def one(attention: str, way: str) -> Record:
        model = c.build(attention=attention)
        ids = c.token_ids(setting.context + setting.question + setting.steps)
        shape = shape_of(model.config, model.dtype)
        plan = per_head(model, frequent(setting.kept))
        budgets = (setting.context * share // 10 for share in (8, 6, 4, 2))
        rows = tuple((frequent(tokens),) * shape.kv_heads for tokens in budgets)
        plan = plan.model_copy(update={"heads": rows})
        if way == "generate()":
            kvcompress.attach(model, plan)
            prompt = ids[:, : setting.context]
            mask = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=mask, max_new_tokens=2, do_sample=False)
            return {"ran": True}
        bounds = c.bounds_of(setting.context, *ways[way])
        _, _, kept, error = after_prompt(model, plan, ids, bounds)
        held = [int(k.sum(-1).max()) for k in kept[1] or [] if k is not None]
        return {"gap": error, "tokens": held}

    return {
        f"{attention}, {way}": c.measured(one, attention, way)
        for attention in ("sdpa", "eager")
        for way in (*ways, "generate()")
    }


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
        model, ids, bounds = standard(setting)
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


def second_turn(setting: Setting) -> Record:
    lengths = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= 2 * setting.turn]

    def one(model: Any, ids: Tensor, context: int, name: str, length: int) -> Record:
        bounds = c.bounds_of(context, length, *[1] * 4)
        cache, _, _, error = after_prompt(model, PLANS[name](model, context // 2), ids, bounds)
        return {"gap": error, "tokens": tokens_held(cache, bounds[-1])[0]}

    random_model, ids = c.build(), c.token_ids(setting.context + 256)
    trained, tokenizer = c.demo_model()
    text = c.demo_ids(tokenizer, 1024)
    models = {
        "random weights": (random_model, ids, setting.context),
        "trained": (trained, text, min(512, setting.context)),
    }
    return {
        f"{name}, {label}, turn of {length}": c.measured(one, *given, name, length)
        for label, given in models.items()
        for name in ("window votes", "per head 80/20")
        for length in lengths
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


def interleaved(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        other = c.token_ids(setting.context - setting.short_row // 2, seed=5)

        def run(disturb: bool) -> list[Tensor]:
            cache = start(model, PLANS[name](model, setting.kept))
            c.feed(model, cache, ids, bounds[:2])
            if disturb:
                c.feed(model, kvcompress.new_cache(model), other, [0, other.shape[1]])
            return c.feed(model, cache, ids, bounds[1:])

        return {"gap": c.gap(run(True), run(False))}

    return {name: c.measured(one, name) for name in ("window votes", *PER_HEAD)}


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
        model, ids, bounds = standard(setting)
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
        model, ids, bounds = standard(setting)
        cache = start(model, PLANS[name](model, setting.kept))
        c.feed(model, cache, ids, bounds[:2])
        first = c.feed(model, copy.deepcopy(cache), ids, bounds[1:])
        return {"gap": c.gap(c.feed(model, cache, ids, bounds[1:]), first)}

    return {name: c.measured(one, name) for name in ("window votes", *PER_HEAD)}
