"""Weights of one bundle in two formats: 16 bits in some decoder layers, int8 or nf4 in the others.

transformers loads one bitsandbytes format per model and leaves the layers that its configuration
lists as they are, so a bundle with both still loads without kvcompress.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.errors import BundleError
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile
from kvcompress.quant.weights.base import WeightFormat, linear_layers, misfits, output_heads
from kvcompress.recipe import WeightScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scheme_of(
    profile: Path, stored: Profile, plan: Plan, weights: WeightScheme | None
) -> WeightScheme | None:
    """The format that the plan's layers mix with bf16, or else the one that the caller asks for;
    None where neither names one."""
    if not plan.weights:
        return weights
    if weights is not None:
        raise BundleError(
            f"{profile}: its plan gives every decoder layer a weight format; leave --weights out, "
            "or plan without --memory"
        )
    if len(stored.weight_layers) != len(plan.weights):
        raise BundleError(
            f"{profile}: the plan chooses weight formats per layer, which this profile did not "
            "measure; profile again"
        )
    return next((scheme for scheme in plan.weights if scheme != "bf16"), "bf16")


def kept_layers(
    skeleton: PreTrainedModel, weight_format: WeightFormat, profile: Profile, plan: Plan
) -> tuple[str, ...]:
    """Linear layers that stay in 16 bits, the output head apart."""
    unfit = misfits(skeleton, weight_format)
    if not plan.weights:
        return unfit
    pairs = zip(profile.weight_layers, plan.weights, strict=True)
    rounded = {name for layer, scheme in pairs if scheme != "bf16" for name in layer.modules}
    rounded -= {*unfit}
    heads = output_heads(skeleton)
    names = linear_layers(skeleton)
    return tuple(name for name in names if name not in rounded and name not in heads)


def planned_bytes(profile: Profile, plan: Plan) -> int | None:
    """Bytes of the weights as the plan counted them; None where it leaves the format open."""
    return profile.planned_weight_bytes(plan.weights) if plan.weights else None


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in the weight files of a bundle, bitsandbytes' format labels aside."""
    from safetensors import safe_open

    total = 0
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as tensors:
            total += sum(
                tensors.get_tensor(name).nbytes
                for name in tensors.keys()
                if not name.endswith(".weight_format") and ".quant_state." not in name
            )
    return total
