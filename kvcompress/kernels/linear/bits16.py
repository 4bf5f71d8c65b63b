"""Linear layers with 16-bit weights, read by the compiled CPU kernels in steps of few tokens.

A step of one token reads every weight once; torch's product of a bfloat16 matrix and a vector gets
about half of the memory's bandwidth, this one nearly all of it. Some rows are multiplied by the
processor's bfloat16 instructions, where it has them. Where it has none, torch multiplies 16-bit
matrices several times slower than floats; more rows are then multiplied as floats, of which every
16-bit number is one. Sums are of floats, rounded once, in each of these ways.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from kvcompress.kernels.cpu.library import library
from kvcompress.kernels.linear.speed import compute_dtype

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
        same = x.device.type == "cpu" and x.dtype == self.weight.dtype
        if not same or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.numel() // self.in_features
        followed = torch.is_grad_enabled() and x.requires_grad
        kernels = library() if rows <= most_rows(x.dtype) and not followed else None
        if kernels is not None and self.weight.is_contiguous():
            y = kernels.linear16(x.reshape(rows, self.in_features), self.weight, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        if compute_dtype(x.device, x.dtype) == x.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def serve_16_bit(model: nn.Module) -> nn.Module:
    """Replace the model's 16-bit `nn.Linear` layers on the CPU by `Linear16`; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if type(child) is nn.Linear and weight is not None and weight.dtype in _DTYPES:
                if weight.device.type == "cpu":
                    setattr(parent, name, Linear16.of(child))
    return model
