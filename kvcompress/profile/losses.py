"""The loss of a candidate: how far it changes a head's attention output, weighed by its effect.

Δo_h is the change of the outputs of all query heads of KV head h when the candidate's dropped
tokens are left out and its kept ones are read back from their codes. `sensitivity` gives u, and
    loss = mean over held-out rows of |u_h · Δo_h|          nats of KL per predicted token
The absolute value keeps changes of single rows from cancelling by luck. A model that has no
gradients gets
    loss = mean over held-out rows of ‖Δo_h W_O‖² / ‖x + o W_O‖²
where x is the residual stream that the layer reads and o the exact output of all heads. The next
norm reads x + o W_O, so this unit makes layers comparable. x alone would not do: embeddings are
often far shorter than what the first layer adds to them. A norm behind W_O (Gemma's) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

from kvcompress.evict.finish import OUTPUT_NAMES
from kvcompress.plan import HeadPlan, KVDtype
from kvcompress.profile.candidates import keep_set
from kvcompress.profile.collect import LayerRows
from kvcompress.profile.masks import KeepMasks
from kvcompress.quant.codec import roundtrip, value_groups

_SMALLEST: Final = 1e-30


def output_projection(module: nn.Module, width: int) -> Tensor | None:
    """W_O ``[hidden, width]`` of an attention module, None where it has no such layer.

    Found by its usual names, else as the last linear child that reads `width` channels.
    """
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Tensor] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.in_features == width:
            found[name] = child.weight
        elif isinstance(child, Conv1D) and child.weight.shape[0] == width:
            found[name] = child.weight.T
    named = [found[name] for name in OUTPUT_NAMES if name in found]
    weights = named or list(found.values())[-1:]
    return weights[0].detach() if weights else None


class LossMeter:
    """Losses of one layer's heads on one prompt.

    Args:
        center, scale: ``[Hkv, D]`` key constants of the layer.
        gradient: ``[Hkv, G, W, Dv]`` sensitivity of the layer; None measures without it.
    """

    def __init__(
        self, rows: LayerRows, center: Tensor, scale: Tensor, gradient: Tensor | None = None
    ) -> None:
        self.rows, self.gradient = rows, gradient
        device = rows.key.device
        self.center, self.scale = center.to(device)[:, None], scale.to(device)[:, None]
        if gradient is not None:
            return
        weight = _split_output_weight(rows)
        self.gram = weight.mT @ weight
        added = torch.einsum("hwc,hdc->wd", rows.output.transpose(1, 2).flatten(2), weight)
        after = added + rows.residual if added.shape == rows.residual.shape else rows.residual
        self.unit = after.square().sum(-1).clamp_min(_SMALLEST)

    def measure(self, heads: tuple[HeadPlan, ...], masks: KeepMasks) -> Tensor:
        """``[Hkv, C]`` loss of each candidate."""
        kept = {sets: masks.kept(sets) for sets in map(keep_set, heads)}
        losses = torch.zeros(self.rows.key.shape[0], len(heads), device=self.rows.key.device)
        for k_dtype in dict.fromkeys(h.k_dtype for h in heads):
            own = [i for i, h in enumerate(heads) if h.k_dtype == k_dtype]
            weights = self._weights(k_dtype, masks)
            values = {name: self._value(name) for name in {heads[i].v_dtype for i in own}}
            for sets in dict.fromkeys(keep_set(heads[i]) for i in own):
                same = [i for i in own if keep_set(heads[i]) == sets]
                probability = weights * kept[sets].unsqueeze(1)
                total = probability.sum(-1, keepdim=True).clamp_min(_SMALLEST)
                stored = [values[heads[i].v_dtype] for i in same]
                outputs = self._outputs(probability, stored, masks.exact)
                for i, output in zip(same, outputs, strict=True):
                    losses[:, i] = self._loss(output / total)
        return losses

    def _weights(self, k_dtype: KVDtype, masks: KeepMasks) -> Tensor:
        """exp of the shifted logits ``[Hkv, G, W, S]``, exact tokens read exactly."""
        rows = self.rows
        logits = rows.softmax.logits(rows.query, rows.key)
        if k_dtype != "model":
            stored = roundtrip((rows.key - self.center) / self.scale, k_dtype)
            coded = rows.softmax.logits(rows.query, stored * self.scale + self.center)
            logits = torch.where(masks.exact, logits, coded)
        logits = logits.masked_fill(~masks.visible, -torch.inf)
        return (logits - logits.amax(-1, keepdim=True)).exp_()

    def _value(self, v_dtype: KVDtype) -> Tensor:
        value = self.rows.value
        return roundtrip(value, v_dtype, value_groups(v_dtype, value.shape[-1]))

    def _outputs(
        self, probability: Tensor, stored: list[Tensor], exact: Tensor
    ) -> Iterator[Tensor]:
        """Unnormalised outputs ``[Hkv, G, W, Dv]``, one for each stored form of the values."""
        shape = probability.shape[1:3]
        coded = probability.flatten(1, 2) @ torch.cat(stored, -1)
        columns = exact.any(0).nonzero()[:, 0]
        uncoded = (probability[..., columns] * exact[:, columns]).flatten(1, 2)
        dim = self.rows.value.shape[-1]
        for part, value in zip(coded.split(dim, -1), stored, strict=True):
            change = (self.rows.value - value)[:, columns]
            yield (part + uncoded @ change).unflatten(1, shape)

    def _loss(self, output: Tensor) -> Tensor:
        """``[Hkv]`` from outputs ``[Hkv, G, W, Dv]``."""
        change = output - self.rows.output
        if self.gradient is not None:
            return (change * self.gradient).sum((1, 3)).abs().mean(-1)
        delta = change.transpose(1, 2).flatten(2)  # [Hkv, W, G·Dv]
        energy = ((delta @ self.gram) * delta).sum(-1).clamp_min(0)
        return (energy / self.unit).mean(-1)


def _split_output_weight(rows: LayerRows) -> Tensor:
    """``[Hkv, hidden, G·Dv]``: each head's part of W_O; the identity where there is none."""
    heads, groups, _, dim = rows.output.shape
    weight = output_projection(rows.module, heads * groups * dim)
    if weight is None:
        return torch.eye(groups * dim, device=rows.output.device).expand(heads, -1, -1)
    return weight.float().unflatten(1, (heads, groups * dim)).transpose(0, 1)
