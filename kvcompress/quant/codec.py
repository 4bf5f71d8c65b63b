"""Codes of vectors, one vector per (token, head), so that each slot can be overwritten alone.

A vector of `head_dim` numbers becomes
  int8   head_dim bytes, x = scale·code + minimum, code in 0..255
  int4   head_dim/2 bytes, byte j = dim j (low nibble) | dim j + head_dim/2 (high), code in 0..15
  fp8    head_dim bytes e4m3, x = scale·code
  model  the vector itself
with `scale` and `minimum` in float16, one pair for the vector or for each of `groups` equal parts.

Integer codes reach from −65504, the least of float16, to 65504 · 255 (int8) or 65504 · 15 (int4)
above their minimum, fp8 codes to ±65504 · 448. Within that range a number is off by at most half a
step of its code; a number beyond it reads as the end of the range. A part with infinity or NaN in
it reads as NaN throughout, so that attention over it gives NaN, as it does without codes. ``model``
keeps both, and rounds no finite number to infinity.

Groups per channel over many tokens (KIVI, arXiv 2402.02750) would lose accuracy here: slots are
overwritten one by one, and the range of the old tokens would have to hold the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.storage import STORAGES, KVDtype

FP8_MAX: Final = 448.0  # e4m3; torch before 2.12 casts anything above it to NaN
HALF_MAX: Final = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Codes:
    """Stored form of vectors ``[..., D]``.

    Attributes:
        data: ``[..., row]``, see `row_elements`; uint8, float8_e4m3fn or the model's dtype.
        scale: ``[..., groups]`` float16, None for ``model``.
        minimum: ``[..., groups]`` float16, None for ``model`` and ``fp8``.
    """

    data: Tensor
    scale: Tensor | None
    minimum: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same codes with each of their tensors changed: data, then scale, then minimum."""
        data = change(self.data)
        scale = None if self.scale is None else change(self.scale)
        return Codes(data, scale, None if self.minimum is None else change(self.minimum))


def value_groups(dtype: KVDtype, head_dim: int) -> int:
    """Groups of a value vector: int4 values are scaled in parts of at most 64 channels."""
    return STORAGES[dtype].value_groups(head_dim)


def row_elements(dtype: KVDtype, head_dim: int) -> int:
    """Elements of `Codes.data` for one vector."""
    return head_dim // STORAGES[dtype].per_byte


def row_torch_dtype(dtype: KVDtype, model_dtype: torch.dtype) -> torch.dtype:
    """Element type of `Codes.data`."""
    if dtype == "model":
        return model_dtype
    return torch.uint8 if STORAGES[dtype].integer else torch.float8_e4m3fn


def has_minimum(dtype: KVDtype) -> bool:
    return STORAGES[dtype].integer


def encode(x: Tensor, dtype: KVDtype, groups: int = 1) -> Codes:
    """Codes of `x`.

    Args:
        x: ``[..., D]``; D even for int4 and divisible by `groups`.

    Raises:
        ValueError: for an odd D with int4, or a D that `groups` does not divide.
    """
    if dtype == "model":
        return Codes(x, None, None)
    head_dim = x.shape[-1]
    if head_dim % groups or head_dim % STORAGES[dtype].per_byte:
        raise ValueError(f"{dtype} in {groups} groups cannot hold vectors of {head_dim} channels")
    parts = x.float().unflatten(-1, (groups, head_dim // groups))
    if not STORAGES[dtype].integer:
        most = parts.abs().amax(-1)
        scale = _half(most / FP8_MAX).masked_fill_(~most.isfinite(), torch.nan)
        scaled = (parts / scale.float().unsqueeze(-1)).nan_to_num_(0.0)
        data = scaled.clamp(-FP8_MAX, FP8_MAX).flatten(-2).to(torch.float8_e4m3fn)
        return Codes(data, scale, None)
    levels = STORAGES[dtype].levels
    least, most = parts.amin(-1), parts.amax(-1)
    broken = ~(least.isfinite() & most.isfinite())
    # the minimum is rounded first, so that the codes absorb its rounding
    low = least.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).masked_fill_(broken, torch.nan)
    scale = _half((most - low.float()) / levels)
    steps = (parts - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    codes = steps.nan_to_num_(0.0).round_().clamp_(0, levels).to(torch.uint8).flatten(-2)
    return Codes(packed(codes, dtype), scale, low)


def decode(codes: Codes, dtype: KVDtype, head_dim: int) -> Tensor:
    """The vectors ``[..., D]`` in float32. Attention over keys and values never calls it: it reads
    codes in place. Latents are expanded by the model itself and must be decoded for it."""
    if dtype == "model":
        return codes.data.float()
    assert codes.scale is not None
    data = torch.cat(channel_parts(codes.data, dtype), -1)
    groups = codes.scale.shape[-1]
    parts = data.float().unflatten(-1, (groups, head_dim // groups))
    x = parts * codes.scale.float().unsqueeze(-1)
    if codes.minimum is not None:
        x = x + codes.minimum.float().unsqueeze(-1)
    return x.flatten(-2)


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
    """The codes in stored rows: all channels, or one part of them for each code of a byte, from its
    low bits up."""
    storage = STORAGES[dtype]
    if storage.per_byte == 1:
        return [data]
    shifts = range(0, 8, 8 // storage.per_byte)
    return [(data >> shift) & storage.levels for shift in shifts]


def packed(codes: Tensor, dtype: KVDtype) -> Tensor:
    """Inverse of `channel_parts`: RoPE partners share a byte."""
    first, *others = codes.chunk(STORAGES[dtype].per_byte, -1)
    for number, part in enumerate(others, 1):
        first = first | (part << (8 // (1 + len(others)) * number))
    return first


def _half(scale: Tensor) -> Tensor:
    """`scale` as float16, never zero: a constant vector has range 0 and codes 0."""
    return scale.clamp(min=torch.finfo(torch.float16).tiny, max=HALF_MAX).to(torch.float16)
