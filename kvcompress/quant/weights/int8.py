"""LLM.int8 of bitsandbytes: int8 rows with a scale each, outlier columns in 16 bits.

Source: Dettmers et al., arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.weights.base import BITSANDBYTES, PACKED, WeightFormat


def load_kwargs(skip_modules: Sequence[str]) -> dict[str, object]:
    """See `WeightFormat.load_kwargs`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip_modules))
    return {"dtype": torch.bfloat16, "quantization_config": config}


def fits(out_features: int, in_features: int) -> bool:
    return True


def matches(quantization_config: object) -> bool:
    config = quantization_config if isinstance(quantization_config, dict) else {}
    return config.get("quant_method") == "bitsandbytes" and config.get("load_in_8bit") is True


def linear_bytes(out_features: int, in_features: int) -> int:
    """Codes and a float32 scale for each row."""
    return out_features * in_features + 4 * out_features


def roundtrip(weight: Tensor) -> Tensor:
    """Symmetric codes of each row."""
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


FORMAT: Final = WeightFormat(
    "int8", 8.0, BITSANDBYTES, load_kwargs, fits, matches, linear_bytes, roundtrip, PACKED
)
