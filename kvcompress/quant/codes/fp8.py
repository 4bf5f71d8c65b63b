"""8-bit floating point, e4m3: x = scale · code."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.codes.code import Code, Codes, half

FP8_MAX: Final = 448.0  # e4m3; torch before 2.12 casts anything above it to NaN


class Float8(Code):
    def element(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def encode(self, x: Tensor, groups: int) -> Codes:
        parts = x.float().unflatten(-1, (groups, -1))
        most = parts.abs().amax(-1)
        scale = half(most / FP8_MAX).masked_fill_(~most.isfinite(), torch.nan)
        scaled = (parts / scale.float().unsqueeze(-1)).nan_to_num_(0.0)
        data = scaled.clamp(-FP8_MAX, FP8_MAX).flatten(-2).to(torch.float8_e4m3fn)
        return Codes(data, scale, None)

    def parts(self, data: Tensor) -> list[Tensor]:
        return [data]
