"""Codes of other projects by their formulas, on transformers' own cache.

A cache here reads a prompt exactly, then holds what a code reads back of it, its first and newest
tokens aside, as ours does; tokens that come later stay exact. So nothing but the code differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from kvcompress.evaluate.workloads_run import Rival
from kvcompress.quant.codec import channel_parts, encode, turned

SINKS, RECENT, GROUP = 4, 16, 32
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Formula:
    """How keys and values ``[B, H, T, D]`` read once stored.

    Attributes:
        bits: of a number with its scales, at so many channels.
    """

    keys: Rounding
    values: Rounding
    bits: Callable[[int], float]
    about: str

    def rival(self, name: str, config: PretrainedConfig) -> Rival:
        return Rival(name, lambda: self.cache(config))

    def cache(self, config: PretrainedConfig) -> Cache:
        return _Rounded(self, config=config)


class _Rounded(DynamicCache):
    def __init__(self, formula: Formula, **more: Any) -> None:
        super().__init__(**more)
        self.formula = formula

    def update(self, key: Tensor, value: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        found = super().update(key, value, layer, *rest, **more)
        if key.shape[2] > SINKS + RECENT and found[0].shape[2] == key.shape[2]:
            own = self.layers[layer]
            own.keys, own.values = (
                torch.cat([t[:, :, :SINKS], change(t[:, :, SINKS:-RECENT]), t[:, :, -RECENT:]], 2)
                for t, change in ((key, self.formula.keys), (value, self.formula.values))
            )
        return found


def per_token(bits: int) -> Rounding:
    """Asymmetric integers, scale and zero of each token and head."""
    return lambda x: _steps(x, bits)


def rotated_steps(bits: int) -> Rounding:
    """The same behind a Hadamard rotation, without a centre."""
    return lambda x: turned(_steps(turned(x, "rot4"), bits), "rot4")


def rotated_levels(bits: int) -> Rounding:
    """TurboQuant's scalar stage (arXiv 2504.19874): rotation, Lloyd-Max levels, the vector's norm
    kept; without a centre."""
    code = {4: "rot4", 3: "rot3", 2: "rot2"}[bits]

    def change(x: Tensor) -> Tensor:
        codes = encode(x, code)  # type: ignore[arg-type]
        levels = torch.cat(channel_parts(codes.data, code), -1)  # type: ignore[arg-type]
        direction = levels / levels.norm(dim=-1, keepdim=True)
        return turned(direction, "rot4") * x.norm(dim=-1, keepdim=True).half().float()

    return change


def per_channel(bits: int) -> Rounding:
    """KIVI's keys (arXiv 2402.02750): each channel over groups of tokens; a rest stays exact."""

    def change(x: Tensor) -> Tensor:
        whole = x.shape[2] // GROUP * GROUP
        groups = x[:, :, :whole].unflatten(2, (-1, GROUP)).transpose(-1, -2)
        coded = _steps(groups, bits).transpose(-1, -2).flatten(2, 3)
        return torch.cat([coded, x[:, :, whole:]], 2)

    return change


def in_groups(bits: int) -> Rounding:
    """KIVI's values: each token in groups of channels."""
    return lambda x: _steps(x.unflatten(-1, (-1, GROUP)), bits).flatten(-2)


def eight_bit_float(x: Tensor) -> Tensor:
    """e4m3 without scales, as engines store it by default."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _steps(x: Tensor, bits: int) -> Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def _same(change: Callable[[int], Rounding], bits: int, more: float, about: str) -> Formula:
    """One formula for keys and values; `more` bits of scales for a vector."""
    made = change(bits)
    return Formula(made, made, lambda dim: bits + more / dim, about)


FORMULAS: Final[dict[str, Formula]] = {
    "fp8 unscaled": Formula(eight_bit_float, eight_bit_float, lambda dim: 8.0, "e4m3, no scales"),
    **{
        f"int{bits} per token": _same(per_token, bits, 32, "scale and zero of a token and head")
        for bits in (4, 3)
    },
    **{
        f"Hadamard int{bits}": _same(rotated_steps, bits, 32, "rotated, scale and zero, no centre")
        for bits in (4, 3)
    },
    **{
        f"TurboQuant {bits}": _same(rotated_levels, bits, 16, "rotated levels and norm, no centre")
        for bits in (4, 3, 2)
    },
    **{
        f"KIVI {bits}": Formula(
            per_channel(bits),
            in_groups(bits),
            lambda dim, bits=bits: bits + 32 / GROUP,  # type: ignore[misc]
            f"keys per channel, values per token, groups of {GROUP}",
        )
        for bits in (4, 3, 2)
    },
}
