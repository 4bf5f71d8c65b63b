"""The dtype that a model computes in, which may be another than that of its stored weights.

A CPU without instructions for 16-bit products converts each number first: matrices then multiply
several times slower than in float32. Every 16-bit number is a float32, so the weights stay what
they were.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch

from kvcompress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

# `stored` is what the checkpoint says, `auto` is what `compute_dtype` says
Dtype: TypeAlias = Literal["stored", "auto", "float32", "bfloat16", "float16"]

# a product of this size takes milliseconds and tells the same as one of a whole layer
_ROWS, _WIDTH, _TRIES = 128, 768, 3
# how much slower 16 bits have to be: a close call must not fall otherwise on another day
_SLOWER: Final = 1.5


def compute_dtype(device: str | torch.device, stored: torch.dtype) -> torch.dtype:
    """`stored`, or float32 where `device` is a CPU that multiplies it clearly slower.

    The first call for a dtype measures, in less than 0.2 s.
    """
    if torch.device(device).type != "cpu" or stored.itemsize != 2:
        return stored
    slow = _product_seconds(stored) > _SLOWER * _product_seconds(torch.float32)
    return torch.float32 if slow else stored


@cache
def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest of a few matrix products."""
    x, w = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    times = []
    for _ in range(_TRIES):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - begun)
    return min(times)


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
        UnsupportedModelError: if packed weights are to become another dtype.
    """
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
