"""Integers that count equal steps from a minimum up: x = scale · code + minimum.

int8 is a byte for each channel. int4 is head_dim/2 bytes: byte j is channel j in its low four bits
and channel j + head_dim/2 in the high ones, so that RoPE partners share a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.quant.codes.code import HALF_MAX, Code, Codes, half


class Steps(Code):
    def encode(self, x: Tensor, groups: int) -> Codes:
        parts = x.float().unflatten(-1, (groups, -1))
        levels = self.storage.levels
        least, most = parts.amin(-1), parts.amax(-1)
        broken = ~(least.isfinite() & most.isfinite())
        # the minimum is rounded first, so that the codes absorb its rounding
        low = least.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).masked_fill_(broken, torch.nan)
        scale = half((most - low.float()) / levels)
        steps = (parts - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        codes = steps.nan_to_num_(0.0).round_().clamp_(0, levels).to(torch.uint8).flatten(-2)
        return Codes(packed(codes, self._per_byte), scale, low)

    def parts(self, data: Tensor) -> list[Tensor]:
        return unpacked(data, self._per_byte)

    @property
    def _per_byte(self) -> int:
        assert self.storage.bits is not None
        return 8 // self.storage.bits


def unpacked(data: Tensor, per_byte: int) -> list[Tensor]:
    """One run of channels for each code of a byte, from its low bits up."""
    if per_byte == 1:
        return [data]
    bits = 8 // per_byte
    return [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]


def packed(codes: Tensor, per_byte: int) -> Tensor:
    """Inverse of `unpacked`, of all channels in order."""
    first, *others = codes.chunk(per_byte, -1)
    for number, part in enumerate(others, 1):
        first = first | (part << (8 // per_byte * number))
    return first
