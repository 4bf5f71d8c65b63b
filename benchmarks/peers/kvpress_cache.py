"""Situations on kvpress: what its cache holds and how it stands use."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common as c
import kvpress
import torch
from common import Record, Setting
from kvpress_helpers import (
    PER_HEAD,
    PRESSES,
    RATIO,
    SIMPLE,
    after_prompt,
    attentions_of,
    compress,
    full_keys,
    kept_of,
    standard,
)
from torch import Tensor
from transformers import DynamicCache


def storage(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        if name == "ObservedAttention":
            model = c.build(attention="eager")
        full = DynamicCache()
        c.feed(model, full, ids, bounds[:2])
        press = PRESSES[name](model)
        held = c.storage_bytes(compress(model, press, ids[:, : setting.context]))
        claimed = 1 - press.compression_ratio
        numbers = {"claimed": claimed, "bytes": held, "full_bytes": c.storage_bytes(full)}
        if name != "ThinK":  # drops channels: there is no kept set
            _, _, kept, error = after_prompt(model, press, ids, bounds)
            numbers |= {"kept": c.share(kept), "gap": error}
        return numbers

    return {name: c.measured(one, name) for name in PRESSES}


def per_layer(setting: Setting) -> Record:
    ratios = [0.2, 0.4, 0.6, 0.8]
    presses = {
        "PyramidKV": lambda: kvpress.PyramidKVPress(RATIO, window_size=16),
        "PerLayer(Knorm)": lambda: kvpress.PerLayerCompressionPress(
            kvpress.KnormPress(RATIO), ratios
        ),
    }
    ways = {"1-token steps": [1] * setting.steps, "question": [setting.question, 1, 1]}

    def one(make: Callable[[], Any], attention: str, way: str) -> Record:
        model = c.build(attention=attention)
        ids = c.token_ids(setting.context + setting.question + setting.steps)
        press = make()
        if way == "generate()":
            prompt = ids[:, : setting.context]
            with press(model):
                mask = torch.ones_like(prompt)
                model.generate(prompt, attention_mask=mask, max_new_tokens=2, do_sample=False)
            return {"ran": True}
        bounds = c.bounds_of(setting.context, *ways[way])
        cache, _, _, error = after_prompt(model, press, ids, bounds)
        added = sum(ways[way])
        return {"gap": error, "tokens": [x.keys.shape[2] - added for x in cache.layers]}

    return {
        f"{name}, {attention}, {way}": c.measured(one, make, attention, way)
        for name, make in presses.items()
        for attention in ("sdpa", "eager")
        for way in (*ways, "generate()")
    }


def padding(setting: Setting) -> Record:
    pads, context = setting.context - setting.short_row, setting.context
    ids = c.token_ids(context + setting.steps, batch=2)
    ids[1, :pads] = 2
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    bounds = c.bounds_of(context, *[1] * setting.steps)

    def alone(model: Any, press: Any | None, row: Tensor) -> list[Tensor]:
        prompt = row.shape[1] - setting.steps
        own = c.bounds_of(prompt, *[1] * setting.steps)
        cache = DynamicCache()
        if press is None:
            return c.feed(model, cache, row, own)[1:]
        compress(model, press, row[:, :prompt], cache=cache)
        return c.feed(model, cache, row, own[1:])

    def by_generate(model: Any, name: str) -> float:
        with PRESSES[name](model)(model):
            both = c.generated(model, ids[:, :context], mask[:, :context])
            prompt = ids[1:, pads:context]
            single = c.generated(model, prompt, torch.ones_like(prompt))
        return c.gap([both[1:]], [single])

    def one(name: str) -> Record:
        model = c.build()
        full = full_keys(model, ids[:, :context], mask[:, :context])
        cache = compress(model, PRESSES[name](model), ids[:, :context], mask[:, :context])
        held = [layer.keys.shape[2] for layer in cache.layers]
        kept = kept_of(model, cache, full)
        real = torch.stack([k[1, :, pads:].sum(-1) for k in kept if k is not None])
        visible: list[int] = []

        def count(module: Any, args: Any, kwargs: Any) -> None:
            seen = kwargs["attention_mask"]
            if seen is not None:
                seen = seen if seen.dtype == torch.bool else seen > -1
                visible.append(int(seen[1, 0, 0].sum()))

        hook = attentions_of(model)[0].register_forward_pre_hook(count, with_kwargs=True)
        logits = c.feed(model, cache, ids, bounds[1:], mask)
        hook.remove()
        first, short = ids[:1], ids[1:, pads:]
        return {
            "generate_gap": by_generate(model, name),
            "pad_share": [1 - int(real.max()) / held[0], 1 - int(real.min()) / held[0]],
            "least_pad_share": max(0.0, 1 - setting.short_row / held[0]),
            "real_kept": [int(real.min()), int(real.max())],
            "visible_next_step": visible[0] if visible else None,
            "short_row_gap": c.gap(
                [x[1:] for x in logits], alone(model, PRESSES[name](model), short)
            ),
            "short_row_gap_to_uncompressed": c.gap(
                [x[1:] for x in logits], alone(model, None, short)
            ),
            "long_row_gap": c.gap(
                [x[:1] for x in logits], alone(model, PRESSES[name](model), first)
            ),
        }

    return {name: c.measured(one, name) for name in SIMPLE}


def chunked(setting: Setting) -> Record:
    """The press stays on over the four forwards of one prompt."""
    quarter = setting.context // 4

    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        parts = c.bounds_of(*[quarter] * 4, *[1] * setting.steps)
        cache, press = DynamicCache(), PRESSES[name](model)
        full = full_keys(model, ids[:, :quarter])
        with press(model):
            c.feed(model, cache, ids, parts[:2])
            first = kept_of(model, cache, full)
            c.feed(model, cache, ids, parts[1:5])
        held = [x.keys.shape[2] for x in cache.layers]
        got = c.feed(model, cache, ids, parts[4:])
        expected = c.reference(model, ids, parts, [None] + [first] * (len(parts) - 2))
        once = compress(model, PRESSES[name](model), ids[:, : setting.context])
        return {
            "asked": setting.kept,
            "tokens": held,
            "gap": c.gap(got, expected[4:]),
            "gap_to_one_shot": c.gap(got, c.feed(model, once, ids, bounds[1:])),
        }

    return {name: c.measured(one, name) for name in ("Knorm", "StreamingLLM", "SnapKV")}


def second_turn(setting: Setting) -> Record:
    lengths = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= 2 * setting.turn]

    def one(model: Any, ids: Tensor, context: int, name: str, length: int) -> Record:
        bounds = c.bounds_of(context, length, *[1] * 4)
        cache, _, _, error = after_prompt(model, PRESSES[name](model), ids, bounds)
        return {"gap": error, "tokens": cache.layers[0].keys.shape[2]}

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
        for name in ("Knorm", "SnapKV", "AdaKV(SnapKV)")
        for length in lengths
    }


def long_generation(setting: Setting) -> Record:
    """Many single-token steps under the press for decoding."""

    def one(base: str) -> Record:
        model = c.build()
        ids = c.token_ids(setting.context // 16 + setting.long)
        bounds = c.bounds_of(setting.context // 16, *[1] * setting.long)
        bases = {"Knorm": kvpress.KnormPress(), "StreamingLLM": kvpress.StreamingLLMPress()}
        target = setting.long // 2
        press = kvpress.DecodingPress(bases[base], target // 4, target)
        cache, held = DynamicCache(), []
        with press(model):
            c.feed(
                model,
                cache,
                ids,
                bounds,
                before=lambda i: held.append(cache.layers[0].keys.shape[2] if i else 0),
            )
        return {"asked": target, "most_tokens": max(held), "bytes": c.storage_bytes(cache)}

    return {f"Decoding({base})": c.measured(one, base) for base in ("Knorm", "StreamingLLM")}


def interleaved(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        other = c.token_ids(setting.context - setting.short_row // 2, seed=5)

        def run(disturb: bool) -> list[Tensor]:
            cache = compress(model, PRESSES[name](model), ids[:, : setting.context])
            if disturb:
                compress(model, PRESSES[name](model), other)
            return c.feed(model, cache, ids, bounds[1:])

        return {"gap": c.gap(run(True), run(False))}

    return {name: c.measured(one, name) for name in ("Knorm", "SnapKV", *PER_HEAD)}


def intact(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        cache = compress(model, PRESSES[name](model), ids[:, : setting.context])
        before = [layer.keys.clone() for layer in cache.layers]
        c.feed(model, cache, ids, bounds[1:3])
        after = [
            layer.keys[:, :, : b.shape[2]] for layer, b in zip(cache.layers, before, strict=True)
        ]
        changed = [(a != b).any(-1) for a, b in zip(after, before, strict=True)]
        return {
            "changed": sum(int(x.sum()) for x in changed) / sum(x.numel() for x in changed),
            "largest_key": max(float(a.abs().max()) for a in after),
            "largest_key_before": max(float(b.abs().max()) for b in before),
        }

    return {name: c.measured(one, name) for name in ("Knorm", "SnapKV", *PER_HEAD)}


def reuse(setting: Setting) -> Record:
    """Two continuations of one compressed prompt; the first one's tokens are cut off again."""

    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        cache = compress(model, PRESSES[name](model), ids[:, : setting.context])
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        first = c.feed(model, cache, ids, bounds[1:])
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return {"gap": c.gap(c.feed(model, cache, ids, bounds[1:]), first)}

    return {name: c.measured(one, name) for name in ("Knorm", "SnapKV", "AdaKV(SnapKV)")}


def save_load(setting: Setting) -> Record:
    """kvpress saves nothing: its tensors by hand, into a model built anew."""
    from safetensors.torch import load_file, save_file

    def one(name: str, positions: bool) -> Record:
        model, ids, bounds = standard(setting)
        cache = compress(model, PRESSES[name](model), ids[:, : setting.context])
        stored = copy.deepcopy(cache)
        expected = c.feed(model, cache, ids, bounds[1:])
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.safetensors")
            pairs = enumerate(stored.layers)
            save_file(
                {f"{i}{n}": getattr(x, n) for i, x in pairs for n in ("keys", "values")}, path
            )
            tensors = load_file(path)
        fresh = DynamicCache()
        for layer in range(len(stored.layers)):
            fresh.update(tensors[f"{layer}keys"], tensors[f"{layer}values"], layer)
        got = c.feed(c.build(), fresh, ids, bounds[1:], positions=positions)
        return {"gap": c.gap(got, expected)}

    return {
        f"{name}, {label}": c.measured(one, name, positions)
        for name in ("Knorm", "SnapKV", "AdaKV(SnapKV)")
        for label, positions in (("position_ids by hand", True), ("no position_ids", False))
    }
