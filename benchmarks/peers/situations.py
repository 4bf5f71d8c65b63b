"""The situations that are measured in the same steps on both sides.

A side is a module, `kvpress_side` or `kvcompress_side`: its methods by name, how a prompt is
compressed by one, and the names that take part in each situation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import requires
from typing import Any

import common as c
import torch
from common import Record, Setting
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

Situation = Callable[[Any, Setting], Record]


def per_layer(side: Any, setting: Setting) -> Record:
    ways = {"1-token steps": [1] * setting.steps, "question": [setting.question, 1, 1]}

    def one(make: Callable[[Any, Setting], Any], attention: str, way: str) -> Record:
        model = c.build(attention=attention)
        ids = c.token_ids(setting.context + setting.question + setting.steps)
        method = make(model, setting)
        if way == "generate()":
            with side.serving(model, method):
                c.generated(model, ids[:, : setting.context])
            return {"ran": True}
        bounds = c.bounds_of(setting.context, *ways[way])
        cache, _, kept, error = side.after_prompt(model, method, ids, bounds)
        return {"gap": error, "tokens": side.tokens_by_layer(cache, kept, sum(ways[way]))}

    return {
        f"{prefix}{attention}, {way}": c.measured(one, make, attention, way)
        for prefix, make in side.PER_LAYER.items()
        for attention in ("sdpa", "eager")
        for way in (*ways, "generate()")
    }


def second_turn(side: Any, setting: Setting) -> Record:
    lengths = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= 2 * setting.turn]

    def one(model: Any, ids: Tensor, context: int, name: str, length: int) -> Record:
        bounds = c.bounds_of(context, length, *[1] * 4)
        method = side.method(model, name, context // 2)
        cache, _, _, error = side.after_prompt(model, method, ids, bounds)
        return {"gap": error, "tokens": side.tokens_held(cache, bounds[-1])[0]}

    models = c.both_models(setting, 256, 1024)
    return {
        f"{name}, {label}, turn of {length}": c.measured(one, *given, name, length)
        for label, given in models.items()
        for name in side.SECOND_TURN
        for length in lengths
    }


def interleaved(side: Any, setting: Setting) -> Record:
    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        other = c.token_ids(setting.context - setting.short_row // 2, seed=5)

        def run(disturb: bool) -> list[Tensor]:
            method = side.method(model, name, setting.kept)
            cache = side.compressed(model, method, ids[:, : setting.context])
            if disturb:
                side.compressed(model, side.method(model, name, setting.kept), other)
            return c.feed(model, cache, ids, bounds[1:])

        return {"gap": c.gap(run(True), run(False))}

    return {name: c.measured(one, name) for name in side.TOLD_APART}


def quantized_weights(side: Any, setting: Setting) -> Record:
    formats = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8": {"load_in_8bit": True},
    }

    def one(folder: str, options: dict[str, Any], name: str) -> Record:
        _, ids, bounds = c.standard(setting)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
        ).eval()
        method = side.method(model, name, setting.kept)
        return {"gap": side.after_prompt(model, method, ids, bounds)[3]}

    with tempfile.TemporaryDirectory() as folder:
        c.build().save_pretrained(folder)
        return {
            f"{label}, {name}": c.measured(one, folder, options, name)
            for label, options in formats.items()
            for name in side.QUANTIZED_WEIGHTS
        }


def eager(side: Any, setting: Setting) -> Record:
    def one(name: str) -> Record:
        _, ids, bounds = c.standard(setting)
        model = c.build(attention="eager")
        method = side.method(model, name, setting.kept)
        return {"gap": side.after_prompt(model, method, ids, bounds)[3]}

    return {name: c.measured(one, name) for name in side.EAGER}


def families(side: Any, setting: Setting) -> Record:
    """Each family with the caches that a caller may use: a plain one, and the model's own."""

    def one(family: str, name: str, own_cache: bool) -> Record:
        _, ids, bounds = c.standard(setting)
        model = c.build(family)
        cache = DynamicCache(config=model.config) if own_cache else None
        method = side.method(model, name, setting.kept)
        _, _, kept, error = side.after_prompt(model, method, ids, bounds, cache=cache)
        kept = side.after_the_prompt(kept)
        numbers: Record = {"kept": c.share(kept), "gap": error}
        if name == side.VOTES:
            heads = next(k for k in kept if k is not None).shape[1]
            expected = c.best_by_votes(model, ids[:, : setting.context], setting.kept, heads)
            numbers["agreement"] = c.agreement(kept, expected, c.full_layers(model.config))
        return numbers

    result: Record = {}
    for family in c.FAMILIES:
        for name in side.IN_FAMILIES:
            result[f"{family}, {name}"] = c.measured(one, family, name, False)
            windowed = len(c.full_layers(c.build(family).config)) < c.LAYERS
            if side.TAKES_CACHES and windowed:
                result[f"{family}, {name}, model's cache"] = c.measured(one, family, name, True)
    return result


def positions(side: Any, setting: Setting) -> Record:
    """The next tokens after compression, with and without position_ids, and through generate."""

    def by_hand(given: bool) -> Record:
        model, ids, bounds = c.standard(setting)
        make = lambda: side.method(model, side.KEY_NORM, setting.kept)  # noqa: E731
        error = side.after_prompt(model, make(), ids, bounds, positions=given)[3]
        cache = side.compressed(model, make(), ids[:, : setting.context])
        return {"gap": error, "next_position": c.position_of_step(model, cache, ids, bounds, given)}

    return {
        "model(...) without position_ids": c.measured(by_hand, False),
        "model(...) with position_ids": c.measured(by_hand, True),
        "generate()": c.measured(side.by_generate, setting),
    }


def offline(side: Any, setting: Setting) -> Record:
    """Which methods start, on a model in memory and on one in a folder."""

    def one(make: Callable[[Any, int], Any], trained: bool) -> Record:
        model = c.demo_model()[0] if trained else c.build()
        side.compressed(model, make(model, setting.kept), c.token_ids(512))
        return {"ran": True}

    return {
        f"{name}, {label}": c.measured(one, make, trained)
        for name, make in side.OFFLINE.items()
        for label, trained in (("model from a configuration", False), ("model in a folder", True))
    }


def versions(side: Any, setting: Setting) -> Record:
    """Which methods run at all with the transformers that is installed here."""

    def one(name: str) -> Record:
        model, ids, bounds = c.standard(setting)
        cache = side.compressed(
            model, side.method(model, name, setting.kept), ids[:, : setting.context]
        )
        c.feed(model, cache, ids, bounds[1:])
        return {"ran": True}

    return {
        "declared": [x for x in requires(side.NAME) or [] if x.startswith("transformers")],
        "methods": side.METHOD_COUNT,
        "runs": {name: c.measured(one, name) for name in side.VERSIONED},
    }


SHARED: dict[str, Situation] = {
    "per_layer": per_layer,
    "second_turn": second_turn,
    "interleaved": interleaved,
    "quantized_weights": quantized_weights,
    "eager": eager,
    "families": families,
    "positions": positions,
    "offline": offline,
    "versions": versions,
}
