"""The vector itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.quant.codes.code import Code, Codes


class Plain(Code):
    def row(self, head_dim: int) -> int:
        return head_dim

    def element(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def encode(self, x: Tensor, groups: int) -> Codes:
        return Codes(x, None, None)

    def parts(self, data: Tensor) -> list[Tensor]:
        return [data]
