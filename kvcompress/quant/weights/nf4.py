"""NF4 of bitsandbytes, its block scales quantized once more.

Double quantization is not an option here: without it, weights saved after a forward pass on an
AVX512-BF16 CPU carry transposed scales (bitsandbytes 0.50).
Source: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.weights.base import BITSANDBYTES, PACKED, WeightFormat

_OUT_MULTIPLE: Final = 32
_IN_MULTIPLE: Final = 64
_BLOCK: Final = 64
# arXiv 2305.14314, appendix E: quantiles of the normal distribution, scaled to [-1, 1]
_LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def load_kwargs(skip_modules: Sequence[str]) -> dict[str, object]:
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


def matches(quantization_config: object) -> bool:
    config = quantization_config if isinstance(quantization_config, dict) else {}
    return (
        config.get("quant_method") == "bitsandbytes"
        and config.get("load_in_4bit") is True
        and config.get("bnb_4bit_quant_type") == "nf4"
        and config.get("bnb_4bit_use_double_quant") is True
    )


def linear_bytes(out_features: int, in_features: int) -> int:
    """Codes, a byte for the scale of each block, a float32 for 256 of those, and both tables."""
    blocks = -(-out_features * in_features // _BLOCK)
    tables = 4 * (len(_LEVELS) + 256)
    return -(-out_features * in_features // 2) + blocks + 4 * -(-blocks // 256) + tables


def roundtrip(weight: Tensor) -> Tensor:
    """The nearest level of each block's range; the blocks' scales are not rounded here."""
    levels = torch.tensor(_LEVELS, device=weight.device)
    blocks = weight.contiguous().reshape(-1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((blocks / scale).contiguous(), middles)
    return (levels[codes] * scale).reshape(weight.shape)


FORMAT: Final = WeightFormat(
    "nf4", 4.13, BITSANDBYTES, load_kwargs, fits, matches, linear_bytes, roundtrip, PACKED
)
