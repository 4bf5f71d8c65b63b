"""kvpress as a side of `situations`: its presses, and what every situation does with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common as c
import kvpress
import torch
from common import Kept, Record, Setting
from torch import Tensor
from transformers import DynamicCache

RATIO = 0.5  # the share that a press is asked to remove


class LocalDuo(kvpress.DuoAttentionPress):
    """DuoAttention with every second head streaming; its own patterns come from the network."""

    def post_init_from_model(self, model: Any) -> None:
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.sink_size, self.recent_size = 4, c.WINDOW
        self.streaming_mask = (torch.arange(heads) % 2 == 1).expand(layers, heads)


def median_dms(model: Any) -> Any:
    """A threshold that drops about half of the tokens of this prompt."""
    norms = full_keys(model, c.token_ids(256))[0].norm(dim=-1)
    press = kvpress.KnormPress(RATIO)
    return kvpress.DMSPress(press, threshold=-float(norms.median()), sliding_window_size=16)


def snapkv(ratio: float = RATIO) -> Any:
    """Without pooling, so that the rule is the plain one of `common.best_by_votes`."""
    return kvpress.SnapKVPress(ratio, window_size=c.WINDOW, kernel_size=1)


PRESSES: dict[str, Callable[[Any], Any]] = {
    "Random": lambda m: kvpress.RandomPress(RATIO, seed=0),
    "Knorm": lambda m: kvpress.KnormPress(RATIO),
    "SnapKV": lambda m: snapkv(),
    "TOVA": lambda m: kvpress.TOVAPress(RATIO),
    "ExpectedAttention": lambda m: kvpress.ExpectedAttentionPress(RATIO),
    "StreamingLLM": lambda m: kvpress.StreamingLLMPress(RATIO),
    "KeyDiff": lambda m: kvpress.KeyDiffPress(RATIO),
    "LagKV": lambda m: kvpress.LagKVPress(RATIO, lag_size=16),
    "CUR": lambda m: kvpress.CURPress(RATIO),
    "CriticalKV(SnapKV)": lambda m: kvpress.CriticalKVPress(snapkv()),
    "ObservedAttention": lambda m: kvpress.ObservedAttentionPress(RATIO),
    "PyramidKV": lambda m: kvpress.PyramidKVPress(RATIO, window_size=16),
    "AdaKV(SnapKV)": lambda m: kvpress.AdaKVPress(snapkv()),
    "CriticalAdaKV(SnapKV)": lambda m: kvpress.CriticalAdaKVPress(snapkv()),
    "DuoAttention(by hand)": lambda m: LocalDuo(head_compression_ratio=RATIO),
    "DMS(Knorm)": median_dms,
    "ThinK": lambda m: kvpress.ThinKPress(key_channel_compression_ratio=RATIO),
}
SIMPLE = ("Knorm", "SnapKV", "TOVA", "ExpectedAttention", "StreamingLLM", "KeyDiff")
PER_HEAD = ("AdaKV(SnapKV)", "CriticalAdaKV(SnapKV)", "DuoAttention(by hand)", "DMS(Knorm)")
NAME, KEY_NORM, VOTES, TAKES_CACHES = "kvpress", "Knorm", "SnapKV", True
METHOD_COUNT = len([x for x in kvpress.__all__ if x.endswith("Press")]) - 2  # two are abstract
VERSIONED = [name for name in PRESSES if name != "ObservedAttention"]  # eager only
SECOND_TURN = ("Knorm", "SnapKV", "AdaKV(SnapKV)")
TOLD_APART = ("Knorm", "SnapKV", *PER_HEAD)
IN_FAMILIES = ("Knorm", "SnapKV", "ExpectedAttention", "AdaKV(SnapKV)")
QUANTIZED_WEIGHTS = (*IN_FAMILIES, "CriticalKV(SnapKV)", "CriticalAdaKV(SnapKV)")
EAGER = ("Knorm", "SnapKV", "ObservedAttention", "AdaKV(SnapKV)", "DuoAttention(by hand)")
PER_LAYER: dict[str, Callable[[Any, Any], Any]] = {
    "PyramidKV, ": lambda m, s: kvpress.PyramidKVPress(RATIO, window_size=16),
    "PerLayer(Knorm), ": lambda m, s: kvpress.PerLayerCompressionPress(
        kvpress.KnormPress(RATIO), [0.2, 0.4, 0.6, 0.8]
    ),
}
# some need more than the model
OFFLINE: dict[str, Callable[[Any, int], Any]] = {
    "DuoAttention": lambda m, t: kvpress.DuoAttentionPress(RATIO),
    "DuoAttention, on the fly": lambda m, t: kvpress.DuoAttentionPress(
        RATIO, on_the_fly_scoring=True
    ),
    "KVzip": lambda m, t: kvpress.KVzipPress(RATIO),
    "ExpectedAttentionStats": lambda m, t: kvpress.ExpectedAttentionStatsPress(RATIO),
    "QFilter": lambda m, t: kvpress.QFilterPress(RATIO),
    "KVzap": lambda m, t: kvpress.KVzapPress(RATIO),
    "FastKVzip": lambda m, t: kvpress.FastKVzipPress(RATIO),
    "SnapKV": lambda m, t: snapkv(),
    "ExpectedAttention": lambda m, t: kvpress.ExpectedAttentionPress(RATIO),
}


def method(model: Any, name: str, tokens: int | None = None) -> Any:
    """A press; it is told a ratio and not how many tokens that is."""
    return PRESSES[name](model)


def serving(model: Any, press: Any) -> Any:
    """A block in which the model compresses."""
    return press(model)


def tokens_held(cache: Any, seen: int) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def tokens_by_layer(cache: Any, kept: Kept, added: int) -> list[int]:
    """After the prompt, of a cache that has seen `added` more."""
    return [held - added for held in tokens_held(cache, 0)]


def after_the_prompt(kept: Kept) -> Kept:
    return kept


@torch.no_grad()
def full_keys(model: Any, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Per layer ``[B, H, S, D]``: the keys of the same prompt, nothing dropped."""
    cache = DynamicCache()
    c.feed(model, cache, ids, [0, ids.shape[1]], mask)
    return [layer.keys for layer in cache.layers]


def attentions_of(model: Any) -> list[Any]:
    inner = getattr(model.model, "language_model", model.model)
    return [layer.self_attn for layer in inner.layers]


def compressed(
    model: Any, press: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None
) -> Any:
    """The cache after the prompt `ids` under `press`."""
    cache = DynamicCache() if cache is None else cache
    with press(model):
        c.feed(model, cache, ids, [0, ids.shape[1]], mask)
    return cache


def kept_of(model: Any, cache: Any, full: Sequence[Tensor]) -> Kept:
    """What a press left: its stored keys, found among all keys, but those that it masks."""
    result: Kept = []
    for module, layer, keys in zip(attentions_of(model), cache.layers, full, strict=True):
        usable = torch.ones(layer.keys.shape[:3], dtype=torch.bool)
        masked = getattr(module, "masked_key_indices", None)
        if masked is not None:
            usable[tuple(masked)] = False
        if layer.keys.shape[2] == keys.shape[2]:
            result.append(usable)
            continue
        allowed = torch.zeros(keys.shape[:3], dtype=torch.bool)
        for row in range(keys.shape[0]):
            same = (keys[row][:, :, None] == layer.keys[row][:, None]).all(-1)
            allowed[row] = (same & usable[row][:, None]).any(-1)
        result.append(allowed)
    return result


def after_prompt(
    model: Any,
    press: Any,
    ids: Tensor,
    bounds: Sequence[int],
    cache: Any = None,
    positions: bool = True,
) -> tuple[Any, list[Tensor], Kept, float]:
    """Compress ``ids[:, :bounds[1]]`` and go on.

    Returns:
        The cache, the logits of the later chunks, what was kept, and their error against −inf
        masks over the same kept set.
    """
    prompt = ids[:, : bounds[1]]
    full = full_keys(model, prompt)
    cache = compressed(model, press, prompt, cache=cache)
    kept = kept_of(model, cache, full)
    logits = c.feed(model, cache, ids, bounds[1:], positions=positions)
    expected = c.reference(model, ids, bounds, [None] + [kept] * (len(bounds) - 2))
    return cache, logits, kept, c.gap(logits, expected[1:])


def by_generate(setting: Setting) -> Record:
    model, ids, bounds = c.standard(setting)
    prompt = ids[:, : setting.context]
    full = full_keys(model, prompt)
    with kvpress.KnormPress(RATIO)(model):
        out = c.generation(model, prompt, setting.steps)
    stored = [x.keys[:, :, : setting.kept] for x in out.past_key_values.layers]
    kept = [
        (a[:, :, :, None] == b[:, :, None]).all(-1).any(-1)
        for a, b in zip(full, stored, strict=True)
    ]
    sequence = out.sequences[:, : bounds[-1]]
    expected = c.reference(model, sequence, bounds, [None] + [kept] * (len(bounds) - 2))
    return {"gap": c.gap([x[:, None] for x in out.logits[1:]], expected[1:])}
