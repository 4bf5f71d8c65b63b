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
from kvcompress.profile.collect import LayerRows, collected
from kvcompress.profile.losses import Candidates, layer_losses
from kvcompress.profile.masks import KeepMasks
from kvcompress.profile.memory import SCRATCH_BYTES, rows_at_once
from kvcompress.profile.sensitivity import path_gradients
from kvcompress.quant.keystats import KVParams, Rotation, positions_for
from kvcompress.recipe import Keep

LOW_QUANTILE: Final = 0.05


@dataclass(frozen=True)
class Setup:
    """The settings of a measurement, the same for every prompt.

    Attributes:
        ladder: FastGen's keep-sets, whose recovery is measured; may be empty.
        losses: settings of sinks and recent tokens, each with the candidates whose loss is
            measured; the recipe's own comes first. May be empty.
        params: key constants that stored keys are coded with, and the scorer's trained weights.
        gradients: whether losses are in nats, see `losses`.
        rotations: rotary embedding of each layer, for a scorer that needs it.
        scratch_bytes: for rows of attention and their sums, see `memory`.
    """

    shape: ModelShape
    keep: Keep
    special_ids: tuple[int, ...]
    punct_ids: tuple[int, ...]
    ladder: tuple[HeadPlan, ...]
    losses: tuple[tuple[Keep, Candidates], ...]
    params: KVParams
    gradients: bool
    rotations: tuple[Rotation | None, ...] = ()
    scratch_bytes: int = SCRATCH_BYTES

    def classes(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``[S]`` bool: special tokens, punctuation."""
        ids = (self.special_ids, self.punct_ids)
        special, punct = (torch.isin(tokens, _ids(those, tokens)) for those in ids)
        return special, punct

    def collect(self, model: PreTrainedModel, ids: list[int]) -> list[LayerRows]:
        """Every layer on one prompt, ranked by the recipe's scorer."""
        shape, keep = self.shape, self.keep
        trained = {i: self.params.tensors_of(i) for i in range(shape.layers)}
        rows = rows_at_once(self.scratch_bytes, shape.query_heads, len(ids))
        return collected(model, shape, keep, ids, self.rotations, trained, rows)


@dataclass(frozen=True)
class PromptResult:
    """What one prompt gave, in float32 on the CPU.

    Attributes:
        recovery: ``[L, Hkv, len(ladder)]``.
        loss: ``[L, Hkv, C]`` of every entry of `Setup.losses`, side by side.
    """

    recovery: Tensor
    loss: Tensor


def measure_prompt(model: PreTrainedModel, setup: Setup, ids: list[int]) -> PromptResult:
    special, punct = setup.classes(torch.tensor(ids, device=model.device))
    layers = setup.collect(model, ids)
    gradients: list[Tensor] | list[None] = [None] * len(layers)
    if setup.gradients and setup.losses:
        gradients = path_gradients(model, setup.shape, setup.keep, ids, layers)
    recovery, loss = [], []
    with torch.no_grad():
        for rows, gradient in zip(layers, gradients, strict=True):
            recovery.append(_recovery(rows, KeepMasks(rows, setup.keep, special, punct), setup))
            positions = positions_for(rows.prompt_tokens, setup.shape.max_position)
            constants = setup.params.constants(rows.layer, positions)
            settings = [
                (candidates, KeepMasks(rows, keep, special, punct))
                for keep, candidates in setup.losses
            ]
            found = layer_losses(rows, constants, gradient, settings, setup.scratch_bytes)
            none = torch.empty(len(rows.key), 0)
            loss.append(torch.cat([none, *(part.cpu() for part in found)], -1))
    return PromptResult(torch.stack(recovery), torch.stack(loss))


def _recovery(rows: LayerRows, masks: KeepMasks, setup: Setup) -> Tensor:
    """``[Hkv, len(ladder)]``"""
    if not setup.ladder:
        return torch.empty(len(rows.key), 0)
    logits = rows.softmax.logits(rows.query, rows.key)
    attention = logits.masked_fill_(~masks.visible, -torch.inf).softmax(-1)
    reached = [head_recovery(kept_mass(attention, masks.kept(h))) for h in setup.ladder]
    return torch.stack(reached, -1).cpu()


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
