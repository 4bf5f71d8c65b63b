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

import copy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.plan import ModelShape
from kvcompress.profile.collect import attend, held_out_rows
from kvcompress.profile.hf import LayerInput, attention_through
from kvcompress.profile.store import PATH
from kvcompress.recipe import Keep
from kvcompress.runtime.names import as_argument

_TRIAL_TOKENS: Final = 128


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivities on one prompt.

    Attributes:
        gradients: per layer ``[Hkv, G, W, Dv]`` float32, in nats per unit of output; None where
            only the path was wanted.
        path_nats: ``[len(PATH) + 1]`` KL per held-out row at each point of the path and at its end.
    """

    gradients: list[Tensor] | None
    path_nats: Tensor


def path_sensitivity(
    model: PreTrainedModel, shape: ModelShape, keep: Keep, ids: list[int], gradients: bool = True
) -> Sensitivity:
    """See the module docstring.

    Args:
        gradients: without them only the path is walked, for models that have none.

    The rows before the held-out ones run once, without gradients, into transformers' own cache;
    only the W held-out rows are run again for every point of the path, so that memory grows with W
    and not with the prompt.

    Raises:
        RuntimeError: where the model has an operation without a derivative.
    """
    from transformers import DynamicCache

    rows = held_out_rows(len(ids))
    tokens = torch.tensor([ids], device=model.device)
    path = _Path(shape, keep, len(ids))
    with attention_through(model, shape, path.attend):
        prefix = DynamicCache(config=model.config)
        with torch.no_grad():
            model.base_model(input_ids=tokens[:, :-rows], **as_argument(prefix), use_cache=True)
        path.rows = rows

        def predict(alpha: float) -> Tensor:
            path.alpha = alpha
            cache = copy.deepcopy(prefix)
            out = model(input_ids=tokens[:, -rows:], **as_argument(cache), use_cache=True)
            return out.logits[0].float().log_softmax(-1)

        with torch.no_grad():
            full = predict(0.0)
        total: list[Tensor] = []
        nats: list[Tensor] = []
        for alpha in PATH:
            with torch.set_grad_enabled(gradients):
                lost = _kl(full, predict(alpha))
            if gradients:
                steps = _gradients(lost, path.outputs())
                total = [a + b for a, b in zip(total, steps, strict=True)] if total else steps
            nats.append(lost.detach() / rows)
        with torch.no_grad():
            nats.append(_kl(full, predict(1.0)) / rows)
    mean = [gradient / len(PATH) for gradient in total]
    return Sensitivity(mean if gradients else None, torch.stack(nats))


def _kl(full: Tensor, other: Tensor) -> Tensor:
    """Sum over rows of KL(full ‖ other), from log-probabilities ``[W, vocabulary]``."""
    return (full.exp() * (full - other)).sum()


def _gradients(lost: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Gradient of `lost` with respect to each output, zero where it does not depend on it."""
    found = torch.autograd.grad(lost, outputs, allow_unused=True, materialize_grads=True)
    return list(found)


class _Path:
    """Attention whose held-out rows lie at `alpha` between the full cache and bare heads.

    Attributes:
        rows: held-out rows in the chunk that runs; 0 while the rows before them run.
    """

    def __init__(self, shape: ModelShape, keep: Keep, length: int) -> None:
        self.shape, self.keep, self.length = shape, keep, length
        self.rows = 0
        self.alpha = 0.0
        self._outputs: dict[int, Tensor] = {}

    def outputs(self) -> list[Tensor]:
        """``[Hkv, G, W, Dv]`` of every layer in the last forward."""
        return [self._outputs[layer] for layer in range(self.shape.layers)]

    def attend(self, given: LayerInput) -> Tensor:
        if not self.rows:
            return attend(given)
        softmax, key, value = given.softmax, given.key, given.value
        logits = softmax.logits(given.query, key)
        # only the newest keys come where the architecture's own window has dropped the first ones
        first = self.length - key.shape[1]
        position = torch.arange(first, self.length, device=key.device)
        row = torch.arange(self.length - self.rows, self.length, device=key.device)[:, None]
        visible = softmax.visible(key.shape[1] - self.rows, self.rows, key.shape[1], key.device)
        sinks = 0 if softmax.window is not None else self.keep.sink_tokens
        bare = visible & ((position < sinks) | (position > row - self.keep.recent_tokens))
        out = _output(logits, visible, value)
        if self.alpha:
            out = torch.lerp(out, _output(logits, bare, value), self.alpha)
        if torch.is_grad_enabled() and not out.requires_grad:
            out.requires_grad_()
        self._outputs[given.layer] = out
        return out


def _output(logits: Tensor, seen: Tensor, value: Tensor) -> Tensor:
    """``[Hkv, G, W, Dv]`` attention output over the keys that are `seen`."""
    probability = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (probability.flatten(1, 2) @ value).unflatten(1, probability.shape[1:3])


def why_no_gradients(model: PreTrainedModel, shape: ModelShape, keep: Keep, ids: list[int]) -> str:
    """Empty where `path_sensitivity` works for the model, else the reason in one line."""
    try:
        found = path_sensitivity(model, shape, keep, ids[:_TRIAL_TOKENS]).gradients
        assert found is not None
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the model's backward pass failed ({lines[0][:200]})"
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        return "the model's gradients are not finite"
    return ""
