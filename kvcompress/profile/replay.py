"""Run a prompt's held-out rows again with other attention, on the keys that the prompt left.

The rows before them are not run again: their keys and values are those of the full cache, as the
runtime's are, which compresses a prompt when it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.plan import HeadPlan, ModelShape, Plan
from kvcompress.profile.collect import LayerRows
from kvcompress.profile.hf import LayerInput, attention_through
from kvcompress.profile.losses import StoredRows, some_heads
from kvcompress.profile.masks import KeepMasks
from kvcompress.quant.keystats import KVParams, positions_for
from kvcompress.recipe import Keep

Attention = Callable[[LayerRows], Tensor]


def replay(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: list[int],
    layers: Sequence[LayerRows],
    attention: Attention,
) -> Tensor:
    """Logits ``[W, vocabulary]`` of the held-out rows.

    Args:
        layers: the prompt, as `collect.collected` gives it.
        attention: output ``[Hkv, G, W, Dv]`` of a layer. It is given the layer's rows with the
            queries, and with the held-out rows' keys and values, of this forward.
    """

    def run(given: LayerInput) -> Tensor:
        before = layers[given.layer]
        start = before.prompt_tokens
        key = torch.cat([before.key[:, :start], given.key], 1)
        value = torch.cat([before.value[:, :start], given.value], 1)
        return attention(replace(before, query=given.query, key=key, value=value))

    start = layers[0].prompt_tokens
    tokens = torch.tensor([ids[start:]], device=model.device)
    position = torch.arange(start, len(ids), device=model.device)[None]
    with attention_through(model, shape, run):
        out = model(input_ids=tokens, position_ids=position, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits


def full_attention(rows: LayerRows) -> Tensor:
    """What the model itself does."""
    visible = _visible(rows)
    return attention_over(rows, visible)


def attention_over(rows: LayerRows, seen: Tensor) -> Tensor:
    """``[Hkv, G, W, Dv]`` attention output over the keys that are `seen`, ``[W, S]`` bool."""
    logits = rows.softmax.logits(rows.query, rows.key)
    probability = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (probability.flatten(1, 2) @ rows.value).unflatten(1, probability.shape[1:3])


def bare_attention(rows: LayerRows, keep: Keep) -> Tensor:
    """As if every head held its sinks and recent tokens alone."""
    none = torch.zeros_like(rows.ranks[0, 0], dtype=torch.bool)
    return attention_over(rows, KeepMasks(rows, keep, none, none).exact)


def _visible(rows: LayerRows) -> Tensor:
    start, tokens = rows.prompt_tokens, rows.key.shape[1]
    return rows.softmax.visible(start, tokens - start, tokens, rows.key.device)


def planned_attention(
    plan: Plan, keep: Keep, params: KVParams, special: Tensor, punct: Tensor
) -> Attention:
    """Attention as `plan` would have it: each head's keep-set, read back from its codes.

    Args:
        keep: the plan's own settings.
        special, punct: ``[S]`` bool.
    """

    def attend(rows: LayerRows) -> Tensor:
        out = rows.query.new_empty(*rows.query.shape[:3], rows.value.shape[-1])
        alike: dict[HeadPlan, list[int]] = {}
        for number, head in enumerate(plan.heads[rows.layer]):
            alike.setdefault(head, []).append(number)
        positions = positions_for(rows.prompt_tokens, plan.max_position)
        center, scale = params.constants(rows.layer, positions)
        for head, numbers in alike.items():
            part = some_heads(rows, numbers)
            masks = KeepMasks(part, keep, special, punct)
            out[numbers] = StoredRows(part, center[numbers], scale[numbers]).output(head, masks)
        return out

    return attend


def mean_kl(full: Tensor, other: Tensor) -> Tensor:
    """KL(full ‖ other) in nats, the mean over rows of log-probabilities ``[W, vocabulary]``."""
    return (full.exp() * (full - other)).sum(-1).mean()
