"""A Hadamard rotation, then one of a few levels for each channel: x = rotation(scale · level).

The rotation spreads what a few channels hold over all of them, after which channels are close to
normal numbers, and the levels are those that lose least of normal numbers (Lloyd 1982, Max 1960).
One float16 scale for a vector, by least squares, is all that is held beside the codes. Keys are
coded around their centre and over the root of their scale, see `keystats`; without that, rotations
fail on models whose keys have large biases.

Levels are whole numbers of at most 127, so that a kernel multiplies them as bytes. A code is the
number of a level from below.
  rot4   head_dim/2 bytes, byte j = channel j (low bits) | channel j + head_dim/2 (high bits)
  rot2   head_dim/4 bytes, byte j = channels j, j + head_dim/4, j + head_dim/2, j + 3 head_dim/4
  rot3   the two low bits of all codes as rot2 has them, then head_dim/8 bytes of their third bits,
         channel j in bit j mod 8 of byte j div 8

Sources: QuaRot (arXiv 2404.00456) rotates caches; TurboQuant (arXiv 2504.19874) puts Lloyd-Max
levels behind a rotation. Differs from them: centre and scale of keys, and least squares.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from kvcompress.quant.codes.code import HALF_MAX, Code, Codes
from kvcompress.quant.codes.steps import packed, unpacked

# The upper half of the levels of N(0, 1), times UNITS. Of the whole numbers near the best, these
# lie on a curve, so that a GPU needs no table: level i is a u + b u⁵, rounded, with u = i + 1/2 and
# a and b of CURVE.
LEVELS: Final[dict[int, tuple[int, ...]]] = {
    2: (36, 120),
    3: (14, 43, 76, 123),
    4: (6, 18, 30, 43, 57, 73, 94, 123),
}
UNITS: Final = {2: 79.452, 3: 57.020, 4: 45.192}
CURVE: Final = {2: (71.2, 1.738), 3: (28.614, 0.0435), 4: (12.05, 0.001375)}
LARGEST: Final = 2.0**60  # numbers beyond it read as it, so that no sum overflows
SMALLEST: Final = 2.0**-100  # of a vector's spread; below it the codes are those of zeros


class Rotated(Code):
    def encode(self, x: Tensor, groups: int) -> Codes:
        if groups != 1:
            raise ValueError(f"rotated vectors have one scale, not {groups}")
        broken = ~x.isfinite().all(-1, keepdim=True)
        turned = self.turned(x.float().masked_fill(broken, 0.0).clamp(-LARGEST, LARGEST))
        levels, middles = (t.to(x.device) for t in _tables(self._bits))
        # sums in float64, so that their order, which kernels choose, hardly ever matters
        exact = turned.double()
        spread = exact.square().mean(-1, keepdim=True).sqrt()
        factor = (UNITS[self._bits] / spread).masked_fill_(spread < SMALLEST, 0.0).float()
        code = torch.bucketize(turned * factor, middles)
        chosen = levels[code].double()
        fitted = (exact * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)
        scale = fitted.float().clamp(max=HALF_MAX).to(torch.float16).masked_fill_(broken, torch.nan)
        return Codes(self._packed(code.masked_fill_(broken, 0).to(torch.uint8)), scale, None)

    def parts(self, data: Tensor) -> list[Tensor]:
        return [_tables(self._bits)[0].to(data.device)[code] for code in self._codes(data)]

    def turned(self, x: Tensor) -> Tensor:
        return rotated(x)

    @property
    def _bits(self) -> int:
        assert self.storage.bits is not None
        return self.storage.bits

    def _packed(self, code: Tensor) -> Tensor:
        if self._bits != 3:
            return packed(code, 8 // self._bits)
        third = (code >> 2).unflatten(-1, (-1, 8)) << _eight(code)
        return torch.cat([packed(code & 3, 4), third.sum(-1, dtype=torch.uint8)], -1)

    def _codes(self, data: Tensor) -> list[Tensor]:
        """Places in the table, int32, in equal runs of channels."""
        if self._bits != 3:
            return [part.int() for part in unpacked(data, 8 // self._bits)]
        low, high = data.split([data.shape[-1] // 3 * 2, data.shape[-1] // 3], -1)
        third = ((high.unsqueeze(-1) >> _eight(data)) & 1).flatten(-2).int().chunk(4, -1)
        return [a.int() | (b << 2) for a, b in zip(unpacked(low, 4), third, strict=True)]


def rotated(x: Tensor) -> Tensor:
    """`x` ``[..., D]`` float32 times a symmetric orthogonal matrix, which is its own inverse.

    With D = m · p, p a power of two and m odd, it is the Walsh-Hadamard transform of each run of p
    channels and, across the runs, the discrete Hartley transform (Bracewell 1983); before and after
    them the signs of some channels change, so that equal channels are no single channel's.
    """
    dim = x.shape[-1]
    size, sign = dim & -dim, signs(dim).to(x.device)
    x, step = x.float() * sign, 1
    while step < size:  # the order of these sums is fixed: kernels have to give the same bits
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    x = x * size**-0.5
    if dim > size:
        mixed = hartley(dim // size).to(x.device) @ x.double().unflatten(-1, (-1, size))
        x = mixed.flatten(-2).float()
    return x * sign


@cache
def matrix(dim: int, device: torch.device) -> Tensor:
    """``[D, D]`` float32: `rotated` as one product."""
    return rotated(torch.eye(dim)).to(device)


@cache
def signs(dim: int) -> Tensor:
    """``[D]`` float32, 1 or −1: the top bit of a hash of the channel."""
    number = torch.arange(dim) * 0x9E3779B1 & 0xFFFFFFFF
    number = (number ^ (number >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
    return 1.0 - 2.0 * (number >> 31)


@cache
def hartley(size: int) -> Tensor:
    """``[size, size]`` float64: cos + sin of 2π i j / size, over the root of the size."""
    place = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * (place[:, None] * place % size) / size
    return (angle.cos() + angle.sin()) * size**-0.5


@cache
def _tables(bits: int) -> tuple[Tensor, Tensor]:
    """All levels as float32 numbers from below, and the middles between them."""
    upper = torch.tensor(LEVELS[bits], dtype=torch.float32)
    levels = torch.cat([-upper.flip(0), upper])
    return levels, (levels[1:] + levels[:-1]) / 2


def _eight(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
