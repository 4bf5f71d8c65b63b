"""NF4 of bitsandbytes, its block scales quantized once more.

Double quantization is not an option here: without it, weights saved after a forward pass on an
AVX512-BF16 CPU carry transposed scales (bitsandbytes 0.50).
Source: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from kvcompress.quant.weights.base import BITSANDBYTES, WeightFormat

_OUT_MULTIPLE: Final = 32
_IN_MULTIPLE: Final = 64


def load_kwargs(skip_modules: Sequence[str]) -> dict[str, Any]:
    """See `WeightFormat.load_kwargs`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(skip_modules),
    )
    return {"dtype": torch.bfloat16, "quantization_config": config}


def fits(out_features: int, in_features: int) -> bool:
    """The fused CPU kernel works on blocks of 32 rows and 64 columns and fails on anything else."""
    return out_features % _OUT_MULTIPLE == 0 and in_features % _IN_MULTIPLE == 0


def matches(quantization_config: dict[str, Any] | None) -> bool:
    config = quantization_config or {}
    return (
        config.get("quant_method") == "bitsandbytes"
        and config.get("load_in_4bit") is True
        and config.get("bnb_4bit_quant_type") == "nf4"
        and config.get("bnb_4bit_use_double_quant") is True
    )


FORMAT: Final = WeightFormat("nf4", 4.13, BITSANDBYTES, load_kwargs, fits, matches)
