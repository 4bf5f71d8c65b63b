"""Situations on kvpress: quantization, model families, positions, starting offline, versions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import requires
from typing import Any

import common as c
import kvpress
import torch
from common import Kept, Record, Setting
from kvpress_helpers import PRESSES, RATIO, after_prompt, compress, full_keys, snapkv, standard
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, QuantizedCache


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
    trained, tokenizer = c.demo_model()
    text = c.demo_ids(tokenizer, 512 + setting.steps)
    steps = [1] * setting.steps
    models = {
        "random weights": (c.build(), standard(setting)[1], setting.context),
        "trained": (trained, text, min(512, setting.context)),
    }

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
            compress(model, PRESSES[name](model), prompt, cache=cache)
            return {"bytes": c.storage_bytes(cache)}
        exact, press = (
            Recording(RATIO if name else 0.0, window_size=c.WINDOW, kernel_size=1) for _ in range(2)
        )
        compress(model, exact, prompt)
        compress(model, press, prompt, cache=cache)
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


def quantized_weights(setting: Setting) -> Record:
    formats = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8": {"load_in_8bit": True},
    }

    def one(folder: str, options: dict[str, Any], name: str) -> Record:
        _, ids, bounds = standard(setting)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
        ).eval()
        return {"gap": after_prompt(model, PRESSES[name](model), ids, bounds)[3]}

    with tempfile.TemporaryDirectory() as folder:
        c.build().save_pretrained(folder)
        return {
            f"{label}, {name}": c.measured(one, folder, options, name)
            for label, options in formats.items()
            for name in ("Knorm", "SnapKV", "ExpectedAttention", "AdaKV(SnapKV)")
            + ("CriticalKV(SnapKV)", "CriticalAdaKV(SnapKV)")
        }


def eager(setting: Setting) -> Record:
    def one(name: str) -> Record:
        _, ids, bounds = standard(setting)
        model = c.build(attention="eager")
        return {"gap": after_prompt(model, PRESSES[name](model), ids, bounds)[3]}

    names = ("Knorm", "SnapKV", "ObservedAttention", "AdaKV(SnapKV)", "DuoAttention(by hand)")
    return {name: c.measured(one, name) for name in names}


def families(setting: Setting) -> Record:
    """Each family with the two caches a caller may use: the pipeline's, and the model's own."""

    def one(family: str, name: str, own_cache: bool) -> Record:
        _, ids, bounds = standard(setting)
        model = c.build(family)
        cache = DynamicCache(config=model.config) if own_cache else DynamicCache()
        press = PRESSES[name](model)
        _, _, kept, error = after_prompt(model, press, ids, bounds, cache)
        numbers: Record = {"kept": c.share(kept), "gap": error}
        if name == "SnapKV":
            heads = kept[0].shape[1]  # type: ignore[union-attr]
            expected = c.best_by_votes(model, ids[:, : setting.context], setting.kept, heads)
            numbers["agreement"] = c.agreement(kept, expected, c.full_layers(model.config))
        return numbers

    result: Record = {}
    for family in c.FAMILIES:
        for name in ("Knorm", "SnapKV", "ExpectedAttention", "AdaKV(SnapKV)"):
            result[f"{family}, {name}"] = c.measured(one, family, name, False)
            if len(c.full_layers(c.build(family).config)) < c.LAYERS:
                result[f"{family}, {name}, model's cache"] = c.measured(one, family, name, True)
    return result


def positions(setting: Setting) -> Record:
    """The next tokens after compression, with and without position_ids, and through generate."""

    def by_hand(given: bool) -> Record:
        model, ids, bounds = standard(setting)
        full = full_keys(model, ids[:, : setting.context])
        press = kvpress.KnormPress(RATIO)
        cache = compress(model, press, ids[:, : setting.context])
        kept = [
            (full[i][:, :, :, None] == layer.keys[:, :, None]).all(-1).any(-1)
            for i, layer in enumerate(cache.layers)
        ]
        logits = c.feed(model, cache, ids, bounds[1:], positions=given)
        expected = c.reference(model, ids, bounds, [None] + [kept] * (len(bounds) - 2))
        cache = compress(model, press, ids[:, : setting.context])
        position = c.position_of_step(model, cache, ids, bounds, given)
        return {"gap": c.gap(logits, expected[1:]), "next_position": position}

    def by_generate() -> Record:
        model, ids, bounds = standard(setting)
        prompt = ids[:, : setting.context]
        press = kvpress.KnormPress(RATIO)
        full = full_keys(model, prompt)
        with press(model):
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=setting.steps + 1,
                min_new_tokens=setting.steps + 1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        stored = [x.keys[:, :, : setting.kept] for x in out.past_key_values.layers]
        kept = [
            (a[:, :, :, None] == b[:, :, None]).all(-1).any(-1)
            for a, b in zip(full, stored, strict=True)
        ]
        sequence = out.sequences[:, : bounds[-1]]
        expected = c.reference(model, sequence, bounds, [None] + [kept] * (len(bounds) - 2))
        return {"gap": c.gap([x[:, None] for x in out.logits[1:]], expected[1:])}

    return {
        "model(...) without position_ids": c.measured(by_hand, False),
        "model(...) with position_ids": c.measured(by_hand, True),
        "generate()": c.measured(by_generate),
    }


def offline(setting: Setting) -> Record:
    """Presses that need more than the model, on a model in memory and on one in a folder."""
    presses: dict[str, Callable[[], Any]] = {
        "DuoAttention": lambda: kvpress.DuoAttentionPress(RATIO),
        "DuoAttention, on the fly": lambda: kvpress.DuoAttentionPress(
            RATIO, on_the_fly_scoring=True
        ),
        "KVzip": lambda: kvpress.KVzipPress(RATIO),
        "ExpectedAttentionStats": lambda: kvpress.ExpectedAttentionStatsPress(RATIO),
        "QFilter": lambda: kvpress.QFilterPress(RATIO),
        "KVzap": lambda: kvpress.KVzapPress(RATIO),
        "FastKVzip": lambda: kvpress.FastKVzipPress(RATIO),
        "SnapKV": lambda: snapkv(),
        "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(RATIO),
    }

    def one(make: Callable[[], Any], trained: bool) -> Record:
        model = c.demo_model()[0] if trained else c.build()
        compress(model, make(), c.token_ids(512))
        return {"ran": True}

    return {
        f"{name}, {label}": c.measured(one, make, trained)
        for name, make in presses.items()
        for label, trained in (("model from a configuration", False), ("model in a folder", True))
    }


def versions(setting: Setting) -> Record:
    """Which presses run at all with the transformers that is installed here."""

    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        compress(model, PRESSES[name](model), ids[:, : setting.context])
        return {"ran": True}

    declared = [x for x in requires("kvpress") or [] if x.startswith("transformers")]
    public = [x for x in kvpress.__all__ if x.endswith("Press")]
    names = [name for name in PRESSES if name != "ObservedAttention"]  # eager only
    return {
        "declared": declared,
        "methods": len([x for x in public if x not in ("BasePress", "ScorerPress")]),
        "runs": {name: c.measured(one, name) for name in names},
    }
