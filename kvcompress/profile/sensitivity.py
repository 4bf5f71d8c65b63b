"""The effect of a head's attention output on the model's predictions.

A prompt's held-out rows are predicted from two extremes: the full cache, and sinks and recent
tokens alone in every head. Between them lies the path of outputs ``o + α (o_bare − o)``. The
gradient of
    KL(full ‖ α) = Σ over held-out rows of KL between the predictions
with respect to every head's output, averaged over the path, is the sensitivity ``u``: a change δ of
the output of head h costs about ``u_h · δ`` nats, and the change to `bare` in all heads together
costs what the path integral says, KL(full ‖ bare).

The gradient at the full cache alone would mislead. Where the model is sure of a token, its
predictions are flat, though dropping the evidence for it costs everything. And where several heads
find the same token, each of them seems superfluous as long as the others are there.

Source: the path integral of arXiv 1703.01365, equation 3 (integrated gradients), on head outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kvcompress.plan import ModelShape
from kvcompress.profile.collect import LayerRows, collected
from kvcompress.profile.replay import bare_attention, full_attention, replay
from kvcompress.recipe import Keep

# points of the path from the full cache to bare heads, and their weights: Gauss and Legendre's rule
PATH: Final = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
_TRIAL_TOKENS: Final = 128


def path_gradients(
    model: PreTrainedModel,
    shape: ModelShape,
    keep: Keep,
    ids: list[int],
    layers: Sequence[LayerRows],
) -> list[Tensor]:
    """Per layer ``[Hkv, G, W, Dv]`` float32, in nats per unit of output. See the module docstring.

    Only the W held-out rows are run again for every point of the path, so memory grows with W and
    not with the prompt.

    Raises:
        RuntimeError: where the model has an operation without a derivative.
    """
    with torch.no_grad():
        full = replay(model, shape, ids, layers, full_attention).float().softmax(-1)

    def at(alpha: float) -> tuple[Tensor, ...]:
        """The gradient at one point; its graph goes before the next one is made."""
        path = _Path(keep, alpha)
        with torch.enable_grad():
            logits = replay(model, shape, ids, layers, path.attend)
        # d KL(full ‖ α) / d logits; to derive it through the logarithms would hold them all
        by_logits = logits.detach().float().softmax(-1).sub_(full).to(logits.dtype)
        outputs = [path.outputs[layer] for layer in range(shape.layers)]
        return torch.autograd.grad(
            logits, outputs, by_logits, allow_unused=True, materialize_grads=True
        )

    total: list[Tensor] = []
    for alpha, weight in PATH:
        steps = [gradient * weight for gradient in at(alpha)]
        total = [a + b for a, b in zip(total, steps, strict=True)] if total else steps
    return total


class _Path:
    """Attention at `alpha` between the full cache and bare heads.

    Attributes:
        outputs: ``[Hkv, G, W, Dv]`` of every layer in the last forward.
    """

    def __init__(self, keep: Keep, alpha: float) -> None:
        self.keep, self.alpha = keep, alpha
        self.outputs: dict[int, Tensor] = {}

    def attend(self, rows: LayerRows) -> Tensor:
        keep, alpha = self.keep, self.alpha  # the graph holds `between`, and must not hold itself

        def between(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            now = replace(rows, query=query, key=key, value=value)
            return torch.lerp(full_attention(now), bare_attention(now, keep), alpha)

        # [Hq, W, S] of every layer would be most of the memory: the backward pass makes them anew
        out = checkpoint(between, rows.query, rows.key, rows.value, use_reentrant=False)
        if not out.requires_grad:
            out.requires_grad_()
        self.outputs[rows.layer] = out
        return out


def why_no_gradients(model: PreTrainedModel, shape: ModelShape, keep: Keep, ids: list[int]) -> str:
    """Empty where `path_gradients` works for the model, else the reason in one line."""
    ids = ids[:_TRIAL_TOKENS]
    layers = collected(model, shape, Keep(), ids)
    try:
        found = path_gradients(model, shape, keep, ids, layers)
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the model's backward pass failed ({lines[0][:200]})"
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        return "the model's gradients are not finite"
    return ""
