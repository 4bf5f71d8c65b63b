"""Weights as they are, in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.weights.base import FLOATS, WeightFormat


def load_kwargs(skip_modules: Sequence[str]) -> dict[str, object]:
    """Nothing is quantized, so there is nothing to skip."""
    return {"dtype": torch.bfloat16}


def fits(out_features: int, in_features: int) -> bool:
    return True


def matches(quantization_config: object) -> bool:
    return quantization_config is None


def linear_bytes(out_features: int, in_features: int) -> int:
    return 2 * out_features * in_features


def roundtrip(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()


FORMAT: Final = WeightFormat(
    "bf16", 16.0, (), load_kwargs, fits, matches, linear_bytes, roundtrip, FLOATS
)
