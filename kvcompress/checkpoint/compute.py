"""The dtype that a model computes in, which may be another than that of its stored weights.

Every 16-bit number is a float32, so the weights stay what they were.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from kvcompress.errors import UnsupportedModelError
from kvcompress.kernels.linear.speed import compute_dtype

if TYPE_CHECKING:
    from torch import nn

# `stored` is what the checkpoint says, `auto` is what `compute_dtype` says
Dtype: TypeAlias = Literal["stored", "auto", "float32", "bfloat16", "float16"]


def stored_dtype(model: Any) -> torch.dtype:
    """The dtype of the model's checkpoint, which `computing_in` leaves in its configuration."""
    found = getattr(model.config.get_text_config(decoder=True), "dtype", None)
    kept: torch.dtype = found if isinstance(found, torch.dtype) else model.dtype
    return kept


def computing_in(model: Any, dtype: Dtype, name: str) -> Any:
    """The model that was given, with its weights in the dtype to compute in.

    ``auto`` keeps packed weights, and weights that would fill more than half of the memory, as they
    are.

    Raises:
        UnsupportedModelError: if packed weights are to become another dtype, or the word is none.
    """
    if dtype not in get_args(Dtype):
        raise UnsupportedModelError(
            f"{name}: dtype {dtype!r} is none to compute in; choose one of "
            f"{', '.join(get_args(Dtype))}"
        )
    wanted = model.dtype
    if dtype not in ("stored", "auto"):
        wanted = getattr(torch, dtype)
    elif dtype == "auto" and _fits(model):
        wanted = compute_dtype(model.device, model.dtype)
    if wanted == model.dtype:
        return model
    if getattr(model, "hf_quantizer", None) is not None and _is_packed(model):
        if dtype == "auto":
            return model
        raise UnsupportedModelError(
            f"{name}: its weights are packed and compute in {str(model.dtype)[6:]}; leave the "
            "dtype out"
        )
    return model.to(wanted)


def _is_packed(model: nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def _fits(model: nn.Module) -> bool:
    """Whether the weights in float32 take at most half of the machine's memory."""
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    return needed <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
