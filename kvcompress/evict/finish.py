"""The end of a prompt: scores are pooled and finished, with all tokens at hand."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from kvcompress.evict.scorers import Scorer, Tokens

# what model families call the layer of an attention module that reads the heads' outputs
OUTPUT_NAMES: Final = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj", "out")


def finished(scorer: Scorer, score: Tensor, tokens: Tokens, pool_tokens: int) -> Tensor:
    """``[B, Hg, T]`` scores of a prompt, averaged over neighbours, then finished by the scorer."""
    if pool_tokens > 1 and scorer.uses_attention:
        score = pooled(score, tokens.valid, pool_tokens)
    return scorer.finish(score, tokens)


def pooled(score: Tensor, valid: Tensor, width: int) -> Tensor:
    """Mean over the `width` tokens around each, padding and what lies beyond the ends left out.

    Differs from SnapKV (arXiv 2404.14469), which counts what lies beyond the ends as zeros.

    Args:
        score: ``[B, Hg, T]``.
        valid: ``[B, T]`` bool.
        width: odd.
    """
    real = valid[:, None].to(score.dtype).expand_as(score)

    def sums(values: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(values, width, 1, width // 2) * width

    return torch.where(valid[:, None], sums(score * real) / sums(real).clamp(min=1), score)


def output_weight(module: nn.Module, heads: int, width: int) -> Tensor | None:
    """W_O split by KV head, ``[heads, hidden, width]`` float32; None where the module has none.

    The layer itself is run on the identity, so that quantized weights need no special case.

    Args:
        width: channels of one KV head's outputs, that of all query heads that share it.
    """
    children = dict(module.named_children())
    for name in OUTPUT_NAMES:
        layer = children.get(name)
        weight = getattr(layer, "weight", None)
        if layer is None or not isinstance(weight, Tensor):
            continue
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
        eye = torch.eye(heads * width, dtype=dtype, device=weight.device)
        try:
            rows = layer(eye) - layer(torch.zeros_like(eye[:1]))
        except RuntimeError:  # this layer reads another number of channels
            continue
        return rows.float().unflatten(0, (heads, width)).transpose(1, 2)
    return None
