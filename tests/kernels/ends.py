"""Vectors at the ends of every dtype, for every code and every implementation of the codec."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.kernels.view import CodesView
from kvcompress.quant.codec import Codes
from kvcompress.storage import STORAGES

_MOST: Final = {
    torch.float32: torch.finfo(torch.float32).max,
    torch.bfloat16: torch.finfo(torch.bfloat16).max,
    torch.float16: torch.finfo(torch.float16).max,
}
CODES: Final = tuple(STORAGES)


def ends(dtype: torch.dtype, dim: int) -> Tensor:
    """``[N, dim]`` of a dtype: its largest and smallest numbers, alone and beside ordinary ones."""
    most, tiny = _MOST[dtype], torch.finfo(dtype).tiny
    smallest = torch.finfo(dtype).smallest_normal / 4
    lone = [most, -most, tiny, -tiny, smallest, -smallest, 65504.0, -65504.0, 65519.0, -65519.0]
    lone += [65520.0, -65520.0, 70000.0, -70000.0, -91136.0, 1e6, -1e6, 3e7, -3e7, 0.0, -0.0]
    lone = [x for x in lone if abs(x) <= most]
    ordinary = torch.randn(len(lone), dim, generator=torch.Generator().manual_seed(7))
    rows = [torch.zeros(1, dim), torch.full((1, dim), most), torch.full((1, dim), -most)]
    rows += [torch.full((1, dim), tiny), torch.full((1, dim), -70000.0 if most > 7e4 else -6e4)]
    for place in (0, dim // 2 - 1, dim - 1):
        beside = ordinary.clone()
        beside[:, place] = torch.tensor(lone, dtype=torch.float64).float()
        rows.append(beside)
    both = ordinary[:1].clone()
    both[0, 0], both[0, -1] = most, -most
    return torch.cat([*rows, both]).to(dtype)


def broken(dtype: torch.dtype, dim: int) -> Tensor:
    """``[N, dim]`` with infinity or NaN in each vector."""
    rows = torch.randn(9, dim, generator=torch.Generator().manual_seed(8))
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        rows[row, 0] = rows[row + 3, dim - 1] = value
        rows[row + 6, dim // 2] = value
    rows[6, 1] = -torch.inf
    return rows.to(dtype)


def same_bits(ours: Codes | CodesView, theirs: Codes | CodesView) -> None:
    """Equality of every bit, NaN included."""
    for one, other in (
        (ours.data, theirs.data),
        (ours.scale, theirs.scale),
        (ours.minimum, theirs.minimum),
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            nan = (
                one.isnan() if one.is_floating_point() else torch.zeros_like(one, dtype=torch.bool)
            )
            assert one.shape == other.shape
            assert torch.equal(_bits(one)[~nan], _bits(other)[~nan])
            assert not nan.any() or bool(other[nan].isnan().all())


def _bits(t: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return t.view(kinds[t.element_size()])
