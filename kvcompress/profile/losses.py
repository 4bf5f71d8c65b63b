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

With gradients no output is ever made. Softmax weights p and values v give
    u · Δo = Σ_kept p (u · v − u · o) / Σ_kept p
so u · v is one number per row and token, and the sums of all keep-sets are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from torch import Tensor, nn

from kvcompress.evict.finish import OUTPUT_NAMES
from kvcompress.plan import HeadPlan, KVDtype
from kvcompress.profile.candidates import keep_set
from kvcompress.profile.collect import LayerRows
from kvcompress.profile.masks import KeepMasks
from kvcompress.profile.memory import SCRATCH_BYTES
from kvcompress.quant.codec import key_scale, roundtrip, value_groups

_SMALLEST: Final = 1e-30
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True)
class Group:
    """Candidates that store keys alike.

    Attributes:
        columns: (column, place of its keep-set in `Candidates.sets`, place in `v_dtypes`).
    """

    k_dtype: KVDtype
    v_dtypes: tuple[KVDtype, ...]
    columns: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Candidates:
    """Candidates, sorted once by what they share, as every layer and prompt asks for it.

    Attributes:
        sets: their keep-sets without repeats.
    """

    heads: tuple[HeadPlan, ...]
    sets: tuple[HeadPlan, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, heads: tuple[HeadPlan, ...]) -> Self:
        bare = [keep_set(head) for head in heads]
        place = {head: i for i, head in enumerate(dict.fromkeys(bare))}
        groups = []
        for k_dtype in dict.fromkeys(head.k_dtype for head in heads):
            own = [i for i, head in enumerate(heads) if head.k_dtype == k_dtype]
            v_dtypes = tuple(dict.fromkeys(heads[i].v_dtype for i in own))
            columns = tuple((i, place[bare[i]], v_dtypes.index(heads[i].v_dtype)) for i in own)
            groups.append(Group(k_dtype, v_dtypes, columns))
        return cls(heads, tuple(place), tuple(groups))


class StoredRows:
    """A layer's rows as they would be read back from storage.

    Args:
        center, scale: ``[Hkv, D]`` key constants of the layer.
    """

    def __init__(self, rows: LayerRows, center: Tensor, scale: Tensor) -> None:
        self.rows = rows
        device = rows.key.device
        self.center, self.scale = center.to(device)[:, None], scale.to(device)[:, None]
        self._logits: dict[KVDtype, Tensor] = {}
        self._values: dict[KVDtype, Tensor] = {}

    def weights(self, k_dtype: KVDtype, masks: KeepMasks) -> Tensor:
        """exp of the shifted logits ``[Hkv, G, W, S]``, exact tokens read exactly."""
        logits = self._logits_of(k_dtype)
        if k_dtype != "model":
            logits = torch.where(masks.exact, self._logits_of("model"), logits)
        logits = logits.masked_fill(~masks.visible, -torch.inf)
        return logits.sub_(logits.amax(-1, keepdim=True)).exp_()

    def _logits_of(self, k_dtype: KVDtype) -> Tensor:
        if k_dtype not in self._logits:
            rows, key = self.rows, self.rows.key
            if k_dtype != "model":
                scale = key_scale(self.scale, k_dtype)
                key = roundtrip((key - self.center) / scale, k_dtype) * scale + self.center
            self._logits[k_dtype] = rows.softmax.logits(rows.query, key)
        return self._logits[k_dtype]

    def value(self, v_dtype: KVDtype) -> Tensor:
        """``[Hkv, S, Dv]``"""
        if v_dtype not in self._values:
            value = self.rows.value
            groups = value_groups(v_dtype, value.shape[-1])
            self._values[v_dtype] = roundtrip(value, v_dtype, groups)
        return self._values[v_dtype]

    def output(self, head: HeadPlan, masks: KeepMasks) -> Tensor:
        """``[Hkv, G, W, Dv]`` attention output if every head of the layer were `head`."""
        weights = self.weights(head.k_dtype, masks) * masks.kept(head).unsqueeze(1)
        total = weights.sum(-1, keepdim=True).clamp_min(_SMALLEST)
        stored, shape = self.value(head.v_dtype), weights.shape[1:3]
        columns = masks.exact.any(0).nonzero()[:, 0]
        uncoded = (weights[..., columns] * masks.exact[:, columns]).flatten(1, 2)
        out = weights.flatten(1, 2) @ stored
        out += uncoded @ (self.rows.value - stored)[:, columns]
        return out.unflatten(1, shape) / total


def layer_losses(
    rows: LayerRows,
    constants: tuple[Tensor, Tensor],
    gradient: Tensor | None,
    settings: list[tuple[Candidates, KeepMasks]],
    scratch_bytes: int = SCRATCH_BYTES,
) -> list[Tensor]:
    """``[Hkv, C]`` losses of one layer's heads on one prompt, for each of `settings`.

    Args:
        constants: centre and scale ``[Hkv, D]`` of the layer's keys.
        gradient: ``[Hkv, G, W, Dv]`` sensitivity of the layer; None measures without it.
        scratch_bytes: what the sums of some rows may take at once.
    """
    stored = StoredRows(rows, *constants)
    if gradient is None:
        meter = _Residual(stored)
        return [meter.measure(candidates, masks) for candidates, masks in settings]
    effects = _Effects(stored, gradient, scratch_bytes)
    return [effects.measure(candidates, masks) for candidates, masks in settings]


class _Effects:
    """Losses in nats, see the module docstring."""

    def __init__(self, stored: StoredRows, gradient: Tensor, scratch_bytes: int) -> None:
        self.stored, self.gradient, self.scratch_bytes = stored, gradient, scratch_bytes
        self.exact = (gradient * stored.rows.output).sum(-1, keepdim=True)  # u · o [Hkv, G, W, 1]
        self._of: dict[KVDtype, Tensor] = {}

    def measure(self, candidates: Candidates, masks: KeepMasks) -> Tensor:
        rows = self.stored.rows
        heads, groups, count, tokens = *rows.query.shape[:3], rows.key.shape[1]
        kept = [masks.kept(sets).expand(heads, -1, -1) for sets in candidates.sets]
        losses = rows.key.new_zeros(heads, len(candidates.heads))
        for group in candidates.groups:
            columns, sets, values = map(list, zip(*group.columns, strict=True))
            used = sorted({*sets})
            own = [kept[place] for place in used]
            weights = self.stored.weights(group.k_dtype, masks)
            width = len(own) + groups * (2 + len(group.v_dtypes))
            at_once = max(1, self.scratch_bytes // (_FLOAT_BYTES * heads * tokens * width))
            sums = torch.cat(
                [
                    self._sums(slice(low, low + at_once), weights, group, masks, own)
                    for low in range(0, count, at_once)
                ],
                dim=1,
            )
            total = sums[..., :1].clamp_min(_SMALLEST)
            change = (sums[..., 1:] / total).sum(3).abs().mean(1)  # [Hkv, C, v_dtypes]
            losses[:, columns] = change[:, [used.index(place) for place in sets], values]
        return losses

    def _sums(
        self, part: slice, weights: Tensor, group: Group, masks: KeepMasks, kept: list[Tensor]
    ) -> Tensor:
        """Σ_kept p and Σ_kept p (u · v − u · o) of some rows: ``[Hkv, rows, C, G, 1 + v]``."""
        weights = weights[:, :, part]
        columns = [weights]
        for v_dtype in group.v_dtypes:
            effect = self._effect(v_dtype)[:, :, part]
            if v_dtype != "model":
                exact = self._effect("model")[:, :, part]
                effect = torch.where(masks.exact[part], exact, effect)
            columns.append(effect * weights)
        stacked = torch.stack(columns, 2).permute(0, 3, 1, 2, 4)  # [Hkv, rows, G, 1 + v, S]
        chosen = torch.stack([sets[:, part] for sets in kept], 2).to(weights.dtype)
        sums = chosen @ stacked.flatten(2, 3).mT  # [Hkv, rows, C, G (1 + v)]
        return sums.unflatten(-1, (weights.shape[1], len(columns)))

    def _effect(self, v_dtype: KVDtype) -> Tensor:
        """u · v − u · o ``[Hkv, G, W, S]``."""
        if v_dtype not in self._of:
            value = self.stored.value(v_dtype)
            flat = self.gradient.flatten(1, 2) @ value.mT
            self._of[v_dtype] = flat.unflatten(1, self.gradient.shape[1:3]) - self.exact
        return self._of[v_dtype]


class _Residual:
    """Losses by the residual stream, see the module docstring."""

    def __init__(self, stored: StoredRows) -> None:
        rows = stored.rows
        self.stored = stored
        weight = _split_output_weight(rows)
        self.gram = weight.mT @ weight
        added = torch.einsum("hwc,hdc->wd", rows.output.transpose(1, 2).flatten(2), weight)
        after = added + rows.residual if added.shape == rows.residual.shape else rows.residual
        self.unit = after.square().sum(-1).clamp_min(_SMALLEST)

    def measure(self, candidates: Candidates, masks: KeepMasks) -> Tensor:
        outputs = [self.stored.output(head, masks) for head in candidates.heads]
        return torch.stack([self._loss(output) for output in outputs], -1)

    def _loss(self, output: Tensor) -> Tensor:
        """``[Hkv]`` from outputs ``[Hkv, G, W, Dv]``."""
        change = output - self.stored.rows.output
        delta = change.transpose(1, 2).flatten(2)  # [Hkv, W, G·Dv]
        energy = ((delta @ self.gram) * delta).sum(-1).clamp_min(0)
        return (energy / self.unit).mean(-1)


def some_heads(rows: LayerRows, heads: list[int]) -> LayerRows:
    """`rows` of these KV heads alone."""
    return replace(
        rows,
        query=rows.query[heads],
        key=rows.key[heads],
        value=rows.value[heads],
        output=rows.output[heads],
        ranks=rows.ranks[:, heads],
    )


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


def _split_output_weight(rows: LayerRows) -> Tensor:
    """``[Hkv, hidden, G·Dv]``: each head's part of W_O; the identity where there is none."""
    heads, groups, _, dim = rows.output.shape
    weight = output_projection(rows.module, heads * groups * dim)
    if weight is None:
        return torch.eye(groups * dim, device=rows.output.device).expand(heads, -1, -1)
    return weight.float().unflatten(1, (heads, groups * dim)).transpose(0, 1)
