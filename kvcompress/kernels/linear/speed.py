"""Which dtype this machine multiplies matrices fastest in.

A CPU without instructions for 16-bit products converts each number first: matrices then multiply
several times slower than in float32.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Final

import torch

# a product of this size takes milliseconds and tells the same as one of a whole layer
_ROWS, _WIDTH, _TRIES = 128, 768, 3
# how much slower 16 bits have to be: a close call must not fall otherwise on another day
_SLOWER: Final = 1.5


def compute_dtype(device: str | torch.device, stored: torch.dtype) -> torch.dtype:
    """`stored`, or float32 where `device` is a CPU that multiplies it clearly slower.

    The first call for a dtype measures, in less than 0.2 s.
    """
    if torch.device(device).type != "cpu" or stored.itemsize != 2:
        return stored
    slow = product_seconds(stored) > _SLOWER * product_seconds(torch.float32)
    return torch.float32 if slow else stored


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """The shortest of a few matrix products."""
    x, w = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(_TRIES):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - begun)
    return min(times)
