"""A compressed cache filled with random keys and values in place of a prompt.

They pass through the layers' own storing code: the plan's rule ranks, drops and encodes them. What
a prompt's attention would have given as scores is drawn at random, and so is which tokens are
special or punctuation, at the plan's shares. So which tokens stay is chance; how many stay, in what
layout and in how many bytes, is what a prompt leaves.
"""

from __future__ import annotations

import torch

from kvcompress.accounting import cache_bytes, keeps_classes
from kvcompress.errors import KVCompressError
from kvcompress.evict.keepset import PUNCT_FLAG, SPECIAL_FLAG
from kvcompress.measure.caches import Pair
from kvcompress.plan import HOLDS_KV, Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.layer.layer import AbstractLayer
from kvcompress.runtime.prompt.attention_inputs import new_scores
from kvcompress.runtime.prompt.store_prompt import store_prompt
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import needs_whole_prompt


def synthetic_refusal(plan: Plan) -> str | None:
    """Why random keys cannot stand for a prompt under `plan`, None where they can."""
    from kvcompress.evict.scorers import scorer

    kinds = {plan.model.kind(layer) for layer in range(plan.model.layers)}
    reasons = {
        f"layers that hold {', '.join(sorted(kinds - HOLDS_KV))}": bool(kinds - HOLDS_KV),
        "MLA latents": "latent" in kinds,
        "a recall tier": plan.recall is not None,
        "relative positions": plan.positions == "relative",
        "a rule that looks at the whole prompt": needs_whole_prompt(plan),
        f"the scorer {plan.scorer!r}, which looks at the model": bool(scorer(plan.scorer).needs),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def fill_compressed(plan: Plan, params: KVParams | None, pair: Pair) -> CompressedCache:
    """A cache as after a prompt of ``pair[0].shape[2]`` tokens.

    Args:
        pair: keys and values ``[B, Hkv, T, D]`` that every layer stores, in the model's dtype.

    Raises:
        KVCompressError: where the plan needs a real prompt, or the bytes are not those of
            `accounting`.
    """
    reason = synthetic_refusal(plan)
    if reason is not None:
        raise KVCompressError(f"random keys cannot stand for a prompt: the plan has {reason}")
    cache = CompressedCache(plan, params)
    generator = torch.Generator().manual_seed(1)
    for layer in cache.compressed_layers:
        _fill_layer(layer, pair, generator)
    batch, _, tokens, _ = pair[0].shape
    expected = cache_bytes(plan, [tokens] * batch, [tokens] * batch)
    by_text = any(keeps_classes(head) for row in plan.heads for head in row)
    if not by_text and cache.nbytes() != expected:
        raise KVCompressError(
            f"the filled cache holds {cache.nbytes()} bytes, the plan accounts for {expected}: "
            "a defect of the fill"
        )
    return cache


def _fill_layer(layer: AbstractLayer, pair: Pair, generator: torch.Generator) -> None:
    key, value = pair
    layer.lazy_initialization(key, value)
    layer.growing.progress.seen = key.shape[2]
    state = layer.state
    assert state is not None
    state.turn_starts.append(0)
    flags = _flags(layer.settings.plan, key.shape[0], key.shape[2], generator)
    chunk = Chunk(
        query=key, key=key, value=value, position=0, mask=None, valid=None,
        flags=flags.to(key.device) if layer.settings.uses_classes else None,
        scaling=1.0, softcap=None,
    )  # fmt: skip
    rows = layer.settings.plan.score_rows
    state.first_vote = 0 if rows is None else max(0, chunk.length - rows)
    drawn = {
        number: score + torch.rand(score.shape, generator=generator).to(score.device)
        for number, score in new_scores(state, chunk).items()
    }
    store_prompt(state, chunk, drawn)


def _flags(plan: Plan, batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """``[B, T]`` uint8 class flags at the plan's shares."""
    special, punct = torch.rand(2, batch, tokens, generator=generator)
    drawn = SPECIAL_FLAG * (special < plan.special_share) + PUNCT_FLAG * (punct < plan.punct_share)
    return drawn.to(torch.uint8)
