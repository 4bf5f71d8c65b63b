"""Linear layers with 16-bit weights, read by the compiled CPU kernels in steps of few tokens.

A step of one token reads every weight once; torch's product of a bfloat16 matrix and a vector gets
about half of the memory's bandwidth, this one nearly all of it. Some rows are multiplied by the
processor's bfloat16 instructions, where it has them. Sums are of floats, rounded once.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from kvcompress.kernels.cpu.library import library

# of activations; torch's own product is faster with more of them, and soon so where numbers have to
# become floats first
MAX_ROWS: Final = 64
MAX_ROWS_AS_FLOATS: Final = 4
_DTYPES: Final = (torch.bfloat16, torch.float16)


def most_rows(dtype: torch.dtype) -> int:
    """Rows of activations up to which the compiled kernels multiply."""
    kernels = library()
    if kernels is None:
        return 0
    in_pairs = dtype == torch.bfloat16 and kernels.multiplies_bf16
    return MAX_ROWS if in_pairs else MAX_ROWS_AS_FLOATS


class Linear16(nn.Linear):
    """`nn.Linear` with the same parameters under the same names."""

    @staticmethod
    def of(module: nn.Linear) -> Linear16:
        """A layer that shares the parameters of `module`."""
        bias = module.bias is not None
        new = Linear16(module.in_features, module.out_features, bias, device="meta")
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        kernels = library() if x.device.type == "cpu" and rows <= most_rows(x.dtype) else None
        plain = x.dtype == self.weight.dtype and not (torch.is_grad_enabled() and x.requires_grad)
        if kernels is None or not plain or not self.weight.is_contiguous():
            return super().forward(x)
        y = kernels.linear16(x.reshape(rows, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def serve_16_bit(model: nn.Module) -> nn.Module:
    """Replace the model's 16-bit `nn.Linear` layers on the CPU by `Linear16`; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if type(child) is nn.Linear and weight is not None and weight.dtype in _DTYPES:
                if weight.device.type == "cpu":
                    setattr(parent, name, Linear16.of(child))
    return model
