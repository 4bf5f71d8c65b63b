"""Situations that kvpress needs steps of its own for."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import common as c
import kvpress
import torch
from common import Kept, Record, Setting
from kvpress_side import (
    PER_HEAD,
    PRESSES,
    RATIO,
    SIMPLE,
    after_prompt,
    attentions_of,
    compressed,
    full_keys,
    kept_of,
)
from torch import Tensor
from transformers import DynamicCache, QuantizedCache


def storage(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        if name == "ObservedAttention":
            model = c.build(attention="eager")
        full = DynamicCache()
        c.feed(model, full, ids, bounds[:2])
        press = PRESSES[name](model)
        held = c.storage_bytes(compressed(model, press, ids[:, : setting.context]))
        claimed = 1 - press.compression_ratio
        numbers = {"claimed": claimed, "bytes": held, "full_bytes": c.storage_bytes(full)}
        if name != "ThinK":  # drops channels: there is no kept set
            _, _, kept, error = after_prompt(model, press, ids, bounds)
            numbers |= {"kept": c.share(kept), "gap": error}
        return numbers

    return {name: c.measured(one, name) for name in PRESSES}


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
        compressed(model, press, row[:, :prompt], cache=cache)
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
        cache = compressed(model, PRESSES[name](model), ids[:, :context], mask[:, :context])
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
        model, ids, bounds = c.standard(setting)
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
        once = compressed(model, PRESSES[name](model), ids[:, : setting.context])
        return {
            "asked": setting.kept,
            "tokens": held,
            "gap": c.gap(got, expected[4:]),
            "gap_to_one_shot": c.gap(got, c.feed(model, once, ids, bounds[1:])),
        }

    return {name: c.measured(one, name) for name in ("Knorm", "StreamingLLM", "SnapKV")}


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


def intact(setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        cache = compressed(model, PRESSES[name](model), ids[:, : setting.context])
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
        model, ids, bounds = c.standard(setting)
        cache = compressed(model, PRESSES[name](model), ids[:, : setting.context])
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
        model, ids, bounds = c.standard(setting)
        cache = compressed(model, PRESSES[name](model), ids[:, : setting.context])
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


class Recording(kvpress.SnapKVPress):
    """Notes what it keeps, as stored keys of a quantized cache cannot be told apart."""

    def score(self, module: Any, hidden_states: Any, keys: Tensor, *args: Any) -> Tensor:
        score = super().score(module, hidden_states, keys, *args)
        kept_tokens = int(keys.shape[2] * (1 - self.compression_ratio))
        chosen = score.topk(kept_tokens, dim=-1).indices
        self.kept = getattr(self, "kept", {})
        self.kept[module.layer_idx] = torch.zeros_like(score, dtype=torch.bool).scatter_(
            2, chosen, True
        )
        return score

    def kept_set(self) -> Kept:
        return [self.kept[layer] for layer in sorted(self.kept)]


def quantized_cache(setting: Setting) -> Record:
    steps = [1] * setting.steps
    models = c.both_models(setting, setting.steps, 512 + setting.steps)

    def one(
        model: Any, ids: Tensor, context: int, store: tuple[str, int] | None, name: str | None
    ) -> Record:
        bounds = c.bounds_of(context, *steps)
        prompt = ids[:, :context]
        full = DynamicCache()
        if store is None:
            c.feed(model, full, ids, bounds[:2])
            return {"bytes": c.storage_bytes(full)}
        axis = 0 if store[0] == "quanto" else 1  # as transformers documents them
        options = {"nbits": store[1], "axis_key": axis, "axis_value": axis}
        cache = QuantizedCache(store[0], model.config, **options)
        if name == "AdaKV(SnapKV)":
            compressed(model, PRESSES[name](model), prompt, cache=cache)
            return {"bytes": c.storage_bytes(cache)}
        exact, press = (
            Recording(RATIO if name else 0.0, window_size=c.WINDOW, kernel_size=1) for _ in range(2)
        )
        compressed(model, exact, prompt)
        compressed(model, press, prompt, cache=cache)
        held = c.storage_bytes(cache)
        logits = c.feed(model, cache, ids, bounds[1:])
        kept = exact.kept_set() if name else None
        expected = c.reference(model, ids, bounds, [None] + [kept] * len(steps))[1:]
        numbers: Record = {"bytes": held, "kept": 1.0, "gap": c.gap(logits, expected)}
        if kept is not None:
            got = press.kept_set()
            numbers["kept"] = c.share(got)
            numbers["agreement"] = c.agreement(got, kept, range(c.LAYERS))
        return numbers

    ways: dict[str, tuple[tuple[str, int] | None, str | None]] = {"nothing": (None, None)}
    for store in (("quanto", 2), ("quanto", 4), ("hqq", 4), ("hqq", 8)):
        label = f"{store[0]} {store[1]} bits"
        ways[label] = (store, None)
        ways |= {f"{label} + {n}": (store, n) for n in ("SnapKV", "AdaKV(SnapKV)")}
    return {
        f"{way}, {label}": c.measured(one, *given, *options)
        for label, given in models.items()
        for way, options in ways.items()
    }
