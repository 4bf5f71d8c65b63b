"""Linear layers with int8 rows, read as integers by the compiled CPU kernels.

A row of weights is int8 codes and one scale, as bitsandbytes' LLM.int8 stores it (arXiv
2208.07339); activations keep 16 bits of their range, so no outlier columns need a path of their
own. A step of a few tokens reads a byte per weight; longer inputs are multiplied as floats, some
rows at a time.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcompress.errors import UnsupportedModelError
from kvcompress.kernels.cpu.library import library

MAX_ROWS: Final = 48  # of activations that the integer kernel multiplies faster than floats
_WIDENED_ROWS: Final = 4096  # of weights that are widened to floats at a time


class Int8Linear(nn.Module):
    """``y = (x Wᵀ) · scale + bias``.

    Args:
        weight: ``[out, in]`` int8; scale: ``[out]`` float32; bias: ``[out]`` or None.
    """

    weight: Tensor
    scale: Tensor
    row_sum: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("row_sum", weight.sum(1, dtype=torch.int32), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        kernels, rows = library(), x.reshape(-1, self.in_features)
        if kernels is None or x.device.type != "cpu" or rows.shape[0] > MAX_ROWS:
            y = self._widened(rows)
        else:
            y = kernels.linear8(rows, self.weight, self.scale, self.row_sum, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _widened(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.out_features)
        for low in range(0, self.out_features, _WIDENED_ROWS):
            part = slice(low, min(self.out_features, low + _WIDENED_ROWS))
            y[:, part] = functional.linear(x, self.weight[part].to(x.dtype))
        y *= self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Embedding(nn.Module):
    """Rows of an int8 table as vectors of `dtype`; it shares its codes with a tied output layer."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.dtype) * self.scale[ids].unsqueeze(-1).to(self.dtype)


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes ``[out, in]`` and the scale ``[out]`` of each row; symmetric."""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1).clamp_min(1e-12) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8), scale


def quantize_linears(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` by `Int8Linear`, in place; returns the model.

    An output layer that is tied to the embedding shares its codes with an `Int8Embedding`.
    """
    tied = _tied_embedding(model)
    for parent, name, module in _children(model, nn.Linear):
        codes, scale = codes_of(module.weight)
        new = Int8Linear(codes, scale, module.bias)
        if tied is not None and module.weight is tied[2].weight:
            setattr(tied[0], tied[1], Int8Embedding(new.weight, new.scale, module.weight.dtype))
        setattr(parent, name, new)
    return model


def serve_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace bitsandbytes' LLM.int8 layers on the CPU by `Int8Linear` with the same codes.

    Raises:
        UnsupportedModelError: for a layer whose codes have lost their scales.
    """
    from bitsandbytes.nn import Linear8bitLt

    for parent, name, module in _children(model, Linear8bitLt):
        if module.weight.device.type != "cpu" or module.weight.dtype != torch.int8:
            continue
        scale = getattr(module.weight, "SCB", None)
        scale = module.state.SCB if scale is None else scale
        if scale is None:
            raise UnsupportedModelError(f"{name}: int8 weights without their scales")
        setattr(parent, name, Int8Linear(module.weight.data, scale / 127, module.bias))
    return model


def _tied_embedding(model: Any) -> tuple[nn.Module, str, nn.Embedding] | None:
    get_input = getattr(model, "get_input_embeddings", None)
    embedding = None if get_input is None else get_input()
    for parent, name, module in _children(model, nn.Embedding):
        if module is embedding:
            return parent, name, cast(nn.Embedding, module)
    return None


def _children(model: nn.Module, kind: type[Any]) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of every module of a kind."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
