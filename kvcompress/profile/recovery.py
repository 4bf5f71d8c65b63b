"""FastGen's recovery: how much of a head's attention a keep-set retains.

For a row of attention A and the renormalised attention Â over kept tokens of mass m,
‖A − Â‖₁ = (1 − m) + Σ_kept a (1/m − 1) = 2 (1 − m): both readings of the criterion follow from m.

Source: arXiv 2310.01801, equation 1. Differs from the paper: measured on the last 64 to 128 rows
only, which never vote for `frequent`; a low quantile over rows, because a mean is dominated by rows
that sinks satisfy; the minimum over the query heads that share a KV head.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LOW_QUANTILE: Final = 0.05


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
    """``[L, Hkv, C]`` from ``[prompts, L, Hkv, C]``: what all but the worst prompts reach.

    A keep-set later in the chain holds the earlier ones and is given at least their recovery.
    """
    return torch.quantile(recovery, LOW_QUANTILE, dim=0).cummax(-1).values
