"""Codes of vectors, one vector per (token, head), so that each slot can be overwritten alone.

A vector of `head_dim` numbers becomes
  int8, int4        integers above a minimum (codes/steps.py)
  rot4, rot3, rot2  levels behind a rotation (codes/rotated.py)
  fp8               e4m3 numbers (codes/fp8.py)
  model             the vector itself
with scales, and minima, in float16, one for the vector or for each of `groups` equal parts.

Integer codes reach from −65504, the least of float16, to 65504 · 255 (int8) or 65504 · 15 (int4)
above their minimum, fp8 codes to ±65504 · 448, levels to ±65504 · 127 once rotated. Within that
range a number of int8 or int4 is off by at most half a step of its code; a number beyond it reads
as the end of the range. A part with infinity or NaN in it reads as NaN throughout, so that
attention over it gives NaN, as it does without codes. ``model`` keeps both, and rounds no finite
number to infinity.

Groups per channel over many tokens (KIVI, arXiv 2402.02750) would lose accuracy here: slots are
overwritten one by one, and the range of the old tokens would have to hold the new one.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.codes.code import HALF_MAX as HALF_MAX
from kvcompress.quant.codes.code import Code
from kvcompress.quant.codes.code import Codes as Codes
from kvcompress.quant.codes.fp8 import Float8
from kvcompress.quant.codes.rotated import Rotated
from kvcompress.quant.codes.steps import Steps
from kvcompress.storage import STORAGES, Coding, KVDtype

_CLASSES: Final[dict[Coding, type[Code]]] = {
    "plain": Code,
    "steps": Steps,
    "float": Float8,
    "levels": Rotated,
}
CODES: Final[dict[KVDtype, Code]] = {
    name: _CLASSES[storage.coding](storage) for name, storage in STORAGES.items()
}


def value_groups(dtype: KVDtype, head_dim: int) -> int:
    """Groups of a value vector: int4 values are scaled in parts of at most 64 channels."""
    return STORAGES[dtype].value_groups(head_dim)


def row_elements(dtype: KVDtype, head_dim: int) -> int:
    """Elements of `Codes.data` for one vector."""
    return CODES[dtype].row(head_dim)


def row_torch_dtype(dtype: KVDtype, model_dtype: torch.dtype) -> torch.dtype:
    """Element type of `Codes.data`."""
    return CODES[dtype].element(model_dtype)


def has_minimum(dtype: KVDtype) -> bool:
    return STORAGES[dtype].has_minimum


def key_scale(scale: Tensor, dtype: KVDtype) -> Tensor:
    """What keys are divided by before they are coded, of their scale as `keystats` derives it."""
    power = STORAGES[dtype].scale_power
    return scale if power == 1 else scale**power


def encode(x: Tensor, dtype: KVDtype, groups: int = 1) -> Codes:
    """Codes of `x`.

    Args:
        x: ``[..., D]``; D a multiple of the storage's `multiple` and of `groups`.

    Raises:
        ValueError: for another D.
    """
    head_dim = x.shape[-1]
    if head_dim % groups or head_dim % STORAGES[dtype].multiple:
        raise ValueError(f"{dtype} in {groups} groups cannot hold vectors of {head_dim} channels")
    return CODES[dtype].encode(x, groups)


def decode(codes: Codes, dtype: KVDtype, head_dim: int) -> Tensor:
    """The vectors ``[..., D]`` in float32. Attention over keys and values never calls it: it reads
    codes in place. Latents are expanded by the model itself and must be decoded for it."""
    if codes.scale is None:
        return codes.data.float()
    data = torch.cat(channel_parts(codes.data, dtype), -1)
    groups = codes.scale.shape[-1]
    parts = data.float().unflatten(-1, (groups, head_dim // groups))
    x = parts * codes.scale.float().unsqueeze(-1)
    if codes.minimum is not None:
        x = x + codes.minimum.float().unsqueeze(-1)
    return CODES[dtype].turned(x.flatten(-2))


def roundtrip(x: Tensor, dtype: KVDtype, groups: int = 1) -> Tensor:
    """What `x` reads as once stored, float32."""
    return decode(encode(x, dtype, groups), dtype, x.shape[-1])


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype of a model; no finite number becomes infinite."""
    if x.dtype == dtype or dtype == torch.float32:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-most, most), x).to(dtype)


def channel_parts(data: Tensor, dtype: KVDtype) -> list[Tensor]:
    """The numbers of stored rows, before scale and minimum: all channels, or equal runs of them."""
    return CODES[dtype].parts(data)


def turned(x: Tensor, dtype: KVDtype) -> Tensor:
    """Vectors as they are coded, or coded ones as they were, see `Code.turned`."""
    return CODES[dtype].turned(x)
