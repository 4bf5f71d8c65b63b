"""One prompt, one forward: recovery and loss of every head.

FastGen's recovery says how much of a head's attention a keep-set retains. Take a row of attention
A whose kept tokens have mass m, and Â, the same row renormalised over them. Then
‖A − Â‖₁ = (1 − m) + Σ_kept a (1/m − 1) = 2 (1 − m), so both readings of FastGen's criterion follow
from m.

Source: arXiv 2310.01801, equation 1. Differs from the paper: only the last 64 to 128 rows are
measured, and they never vote for `frequent`. A low quantile over rows is taken, because sinks
satisfy most rows and would dominate a mean; then the minimum over the query heads of a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.plan import HeadPlan, ModelShape
from kvcompress.profile.collect import LayerRows, forward, watching_rows
from kvcompress.profile.losses import LossMeter
from kvcompress.profile.masks import KeepMasks
from kvcompress.profile.sensitivity import path_sensitivity
from kvcompress.quant.keystats import KVParams, Rotation
from kvcompress.recipe import Keep

LOW_QUANTILE: Final = 0.05


@dataclass(frozen=True)
class Setup:
    """The settings of a measurement, the same for every prompt.

    Attributes:
        ladder: FastGen's keep-sets, whose recovery is measured.
        heads: candidates whose loss is measured.
        fewer: further settings with fewer sinks and recent tokens, and their candidates.
        params: key constants that stored keys are coded with, and the scorer's trained weights.
        gradients: whether losses are in nats, see `losses`.
        rotations: rotary embedding of each layer, for a scorer that needs it.
    """

    shape: ModelShape
    keep: Keep
    special_ids: tuple[int, ...]
    punct_ids: tuple[int, ...]
    ladder: tuple[HeadPlan, ...]
    heads: tuple[HeadPlan, ...]
    fewer: tuple[tuple[Keep, tuple[HeadPlan, ...]], ...]
    params: KVParams
    gradients: bool
    rotations: tuple[Rotation | None, ...] = ()


@dataclass(frozen=True)
class PromptResult:
    """What one prompt gave, in float32 on the CPU.

    Attributes:
        recovery: ``[L, Hkv, len(ladder)]``.
        loss: ``[L, Hkv, C]`` of `Setup.heads`, then of every entry of `Setup.fewer`.
        shares: ``[2]`` share of special and of punctuation tokens.
        path_nats: see `Sensitivity`.
    """

    recovery: Tensor
    loss: Tensor
    shares: Tensor
    path_nats: Tensor


def measure_prompt(model: PreTrainedModel, setup: Setup, ids: list[int]) -> PromptResult:
    tokens = torch.tensor(ids, device=model.device)
    special = torch.isin(tokens, _ids(setup.special_ids, tokens))
    punct = torch.isin(tokens, _ids(setup.punct_ids, tokens))
    recovery: dict[int, Tensor] = {}
    loss: dict[int, Tensor] = {}
    path = path_sensitivity(model, setup.shape, setup.keep, ids, setup.gradients)

    def observe(rows: LayerRows) -> None:
        masks = KeepMasks(rows, setup.keep, special, punct)
        logits = rows.softmax.logits(rows.query, rows.key)
        attention = logits.masked_fill_(~masks.visible, -torch.inf).softmax(-1)
        reached = [head_recovery(kept_mass(attention, masks.kept(h))) for h in setup.ladder]
        recovery[rows.layer] = torch.stack(reached, -1).cpu()
        center = setup.params.k_center[rows.layer]
        scale = setup.params.k_scale[rows.layer]
        gradient = path.gradients[rows.layer] if path.gradients else None
        meter = LossMeter(rows, center, scale, gradient)
        found = [meter.measure(setup.heads, masks)]
        for keep, heads in setup.fewer:
            found.append(meter.measure(heads, KeepMasks(rows, keep, special, punct)))
        loss[rows.layer] = torch.cat(found, -1).cpu()

    trained = {i: setup.params.tensors_of(i) for i in range(setup.shape.layers)}
    keep, rotations = setup.keep, setup.rotations
    with watching_rows(model, setup.shape, keep, observe, rotations, trained):
        forward(model, ids)
    order = range(setup.shape.layers)
    return PromptResult(
        torch.stack([recovery[i] for i in order]),
        torch.stack([loss[i] for i in order]),
        torch.stack([special.float().mean(), punct.float().mean()]).cpu(),
        path.path_nats.cpu(),
    )


def _ids(ids: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=like.dtype, device=like.device)


def kept_mass(probability: Tensor, kept: Tensor) -> Tensor:
    """``[Hkv, G, W]`` from attention ``[Hkv, G, W, S]`` and a keep-set ``[Hkv or 1, W, S]``."""
    return (probability * kept.unsqueeze(1)).sum(-1)


def l1_distance(mass: Tensor) -> Tensor:
    """‖A − Â‖₁ for kept mass `mass`; see the module docstring."""
    return 2 * (1 - mass)


def head_recovery(mass: Tensor) -> Tensor:
    """``[Hkv]`` mass recovered in all but the worst rows, by the worst query head of the group."""
    return torch.quantile(mass, LOW_QUANTILE, dim=-1).amin(-1)


def over_prompts(recovery: Tensor) -> Tensor:
    """``[L, Hkv, C]`` recovery that all but the worst prompts reach, of ``[prompts, L, Hkv, C]``.

    A later keep-set of the ladder holds the earlier ones and is given at least their recovery.
    """
    return torch.quantile(recovery, LOW_QUANTILE, dim=0).cummax(-1).values
