"""Situations on kvcompress: saving, quantization, families, positions, offline, versions."""

from __future__ import annotations

import tempfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import common as c
import torch
from common import Record, Setting
from kvcompress_helpers import PER_HEAD, PLANS, after_prompt, kept_of, standard, start, window_votes
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import kvcompress
from kvcompress.plan import HeadPlan, uniform
from kvcompress.registry import SCORERS
from kvcompress.runtime.model.families import shape_of


def save_load(setting: Setting) -> Record:
    """Into a model built anew, with the plan attached again."""

    def one(name: str, positions: bool) -> Record:
        model, ids, bounds = standard(setting)
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
    trained, tokenizer = c.demo_model()
    text = c.demo_ids(tokenizer, 512 + setting.steps)
    steps = [1] * setting.steps
    models = {
        "random weights": (c.build(), standard(setting)[1], setting.context),
        "trained": (trained, text, min(512, setting.context)),
    }

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
        return {"gap": after_prompt(model, PLANS[name](model, setting.kept), ids, bounds)[3]}

    with tempfile.TemporaryDirectory() as folder:
        c.build().save_pretrained(folder)
        return {
            f"{label}, {name}": c.measured(one, folder, options, name)
            for label, options in formats.items()
            for name in ("window votes", "key norm", "per head 80/20")
        }


def eager(setting: Setting) -> Record:
    def one(name: str) -> Record:
        _, ids, bounds = standard(setting)
        model = c.build(attention="eager")
        return {"gap": after_prompt(model, PLANS[name](model, setting.kept), ids, bounds)[3]}

    names = ("window votes", "key norm", "heavy hitters", "per head 80/20")
    return {name: c.measured(one, name) for name in names}


def families(setting: Setting) -> Record:
    def one(family: str, name: str) -> Record:
        _, ids, bounds = standard(setting)
        model = c.build(family)
        plan = PLANS[name](model, setting.kept)
        _, _, kept, error = after_prompt(model, plan, ids, bounds)
        numbers: Record = {"kept": c.share(kept[1] or []), "gap": error}
        if name == "window votes":
            heads = plan.model.kv_heads
            expected = c.best_by_votes(model, ids[:, : setting.context], setting.kept, heads)
            layers = c.full_layers(model.config)
            numbers["agreement"] = c.agreement(kept[1] or [], expected, layers)
        return numbers

    return {
        f"{family}, {name}": c.measured(one, family, name)
        for family in c.FAMILIES
        for name in ("key norm", "window votes", "per head 80/20")
    }


def positions(setting: Setting) -> Record:
    """The next tokens after compression, with and without position_ids, and through generate."""

    def by_hand(given: bool) -> Record:
        model, ids, bounds = standard(setting)
        plan = PLANS["key norm"](model, setting.kept)
        error = after_prompt(model, plan, ids, bounds, positions=given)[3]
        cache = start(model, plan)
        c.feed(model, cache, ids, bounds[:2])
        return {"gap": error, "next_position": c.position_of_step(model, cache, ids, bounds, given)}

    def by_generate() -> Record:
        model, ids, bounds = standard(setting)
        plan = PLANS["key norm"](model, setting.kept)
        kvcompress.attach(model, plan)
        prompt = ids[:, : setting.context]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=setting.steps + 1,
            min_new_tokens=setting.steps + 1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        _, _, kept, _ = after_prompt(model, plan, out.sequences, bounds)
        expected = c.reference(model, out.sequences, bounds, kept)
        return {"gap": c.gap([x[:, None] for x in out.logits[1:]], expected[1:])}

    return {
        "model(...) without position_ids": c.measured(by_hand, False),
        "model(...) with position_ids": c.measured(by_hand, True),
        "generate()": c.measured(by_generate),
    }


def offline(setting: Setting) -> Record:
    def one(name: str, trained: bool) -> Record:
        model = c.demo_model()[0] if trained else c.build()
        cache = start(model, PLANS[name](model, setting.kept))
        c.feed(model, cache, c.token_ids(512), [0, 512])
        return {"ran": True}

    return {
        f"{name}, {label}": c.measured(one, name, trained)
        for name in PLANS
        for label, trained in (("model from a configuration", False), ("model in a folder", True))
    }


def versions(setting: Setting) -> Record:
    """Which plans run at all with the transformers that is installed here."""

    def one(name: str) -> Record:
        model, ids, bounds = standard(setting)
        c.feed(model, start(model, PLANS[name](model, setting.kept)), ids, bounds)
        return {"ran": True}

    declared = [x for x in requires("kvcompress") or [] if x.startswith("transformers")]
    return {
        "declared": declared,
        "methods": len(SCORERS),
        "runs": {name: c.measured(one, name) for name in PLANS},
    }
