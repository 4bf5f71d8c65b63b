"""The obvious reference: keep every token, and mask with −inf what was dropped.

Shapes: B rows, Hq query heads, H heads of the cache, S tokens seen, T tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from models import feed
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

WINDOW = 64  # the last rows of a prompt, which vote on what stays and stay themselves
Kept = list[Tensor | None]  # per layer bool [B, H, n] of the first n positions; the others are kept


class _Masked:
    """Attention over every token ever seen, float64, −inf where a token was dropped."""

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.mask: Tensor | None = None
        self.votes: dict[int, Tensor] | None = None

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = query.double(), key.double(), value.double()
        heads, new, seen = query.shape[1], query.shape[2], key.shape[2]
        now, past = torch.arange(seen - new, seen)[:, None], torch.arange(seen)
        visible = (past <= now)[None, None].repeat(query.shape[0], heads, 1, 1)
        if sliding_window is not None:
            visible &= past > now - sliding_window
        if self.mask is not None:
            visible &= self.mask[:, None, None, :seen].bool()
        kept = None if self.kept is None else self.kept[module.layer_idx]
        if kept is not None:
            groups = heads // kept.shape[1]
            visible[..., : kept.shape[2]] &= kept.repeat_interleave(groups, 1)[:, :, None]
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            sink = s_aux.double().reshape(1, -1, 1, 1).expand(query.shape[0], -1, new, 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1).nan_to_num(0.0)[..., :seen]
        if self.votes is not None:
            self.votes[module.layer_idx] = weights[:, :, -WINDOW:].mean(2)  # [B, Hq, S]
        return (weights @ value).transpose(1, 2).contiguous().float(), None


@contextmanager
def _masked_attention(model: Any) -> Iterator[_Masked]:
    masked = _Masked()
    AttentionInterface.register("peers_masked", masked.attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("peers_masked")
    try:
        yield masked
    finally:
        model.set_attn_implementation(before)


def reference(
    model: Any,
    ids: Tensor,
    bounds: Sequence[int],
    kept: Sequence[Kept | None],
    mask: Tensor | None = None,
) -> list[Tensor]:
    """`feed` with nothing dropped and −inf for what ``kept[i]`` leaves out before chunk i."""
    with _masked_attention(model) as masked:
        masked.mask = mask

        def before(number: int) -> None:
            masked.kept = kept[number]

        return feed(model, DynamicCache(), ids, bounds, mask, before=before)


def votes(model: Any, ids: Tensor) -> list[Tensor]:
    """Per layer ``[B, Hq, S]``: mean attention of the last `WINDOW` rows, from the model itself."""
    with _masked_attention(model) as masked:
        masked.votes = {}
        feed(model, DynamicCache(), ids, [0, ids.shape[1]])
        return [masked.votes[layer] for layer in sorted(masked.votes)]


def best_by_votes(model: Any, ids: Tensor, kept_tokens: int, heads: int) -> Kept:
    """SnapKV's rule without pooling: the last `WINDOW` tokens and the best of the others."""
    result: Kept = []
    for vote in votes(model, ids):
        score = vote.unflatten(1, (heads, -1)).mean(2)  # [B, H, S]
        score[..., -WINDOW:] = torch.inf
        chosen = score.topk(kept_tokens, dim=-1).indices
        result.append(torch.zeros_like(score, dtype=torch.bool).scatter_(2, chosen, True))
    return result


def full_layers(config: Any) -> list[int]:
    """Layers without a window of the architecture's own, where eviction alone decides."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [layer for layer, kind in enumerate(types) if kind != "sliding_attention"]


def agreement(got: Kept, expected: Kept, layers: Sequence[int]) -> float:
    """Share of the tokens in `got` that are in `expected` too, over `layers` and all heads."""
    pairs = [(got[layer], expected[layer]) for layer in layers]
    common = sum(int((a & b).sum()) for a, b in pairs if a is not None and b is not None)
    return common / sum(int(a.sum()) for a, _ in pairs if a is not None)


def share(kept: Kept) -> float:
    """Kept entries over all entries."""
    tensors = [k for k in kept if k is not None]
    return sum(int(k.sum()) for k in tensors) / sum(k.numel() for k in tensors)


def gap(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two lists of logits, in standard deviations of the expected ones."""
    largest = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
    return largest / float(torch.cat([b.flatten() for b in expected]).std())
