"""Levels of rotated vectors: the rotation, the best levels, how they are packed, what they lose."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompress.quant.codec import channel_parts, decode, encode, roundtrip, turned
from kvcompress.quant.codes.rotated import CURVE, LEVELS, UNITS, hartley, rotated, signs
from kvcompress.storage import STORAGES

BITS = {"rot4": 4, "rot3": 3, "rot2": 2}
DIMS = (8, 40, 64, 72, 80, 96, 112, 128, 256, 320)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walsh(size: int) -> torch.Tensor:
    """Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_the_matrix_that_it_says(dim):
    size = dim & -dim
    sign = signs(dim).double()
    matrix = torch.kron(hartley(dim // size), walsh(size)) * sign * sign[:, None]
    x = normal(5, dim)
    torch.testing.assert_close(rotated(x).double(), x.double() @ matrix, atol=1e-5, rtol=1e-5)
    assert torch.equal(matrix, matrix.T) or (matrix - matrix.T).abs().max() < 1e-12
    torch.testing.assert_close(rotated(rotated(x)), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_a_single_channel_is_spread_over_all(dim):
    """And equal channels are not gathered in one."""
    one = torch.zeros(dim)
    one[3] = 1.0
    assert rotated(one).abs().max() < 2.1 / math.sqrt(dim)
    if dim >= 32:
        assert rotated(torch.ones(dim)).abs().max() < 0.75 * math.sqrt(dim)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_lose_least_of_normal_numbers(bits):
    """Lloyd's conditions for N(0, 1), as near as whole numbers come, and Max's known error."""
    upper = torch.tensor(LEVELS[bits], dtype=torch.float64) / UNITS[bits]
    levels = torch.cat([-upper.flip(0), upper])
    edges = torch.cat([torch.tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([40.0])])
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges).diff()
    centroid = (density[:-1] - density[1:]) / mass
    assert (levels - centroid).abs().max() < 0.6 / UNITS[bits]
    lost = 1 - 2 * (mass * centroid * levels).sum() + (mass * levels**2).sum()
    assert float(lost) == pytest.approx({2: 0.11748, 3: 0.03454, 4: 0.009497}[bits], rel=3e-3)


@pytest.mark.parametrize("bits", LEVELS)
def test_the_curve_of_the_levels(bits):
    u = torch.arange(len(LEVELS[bits])) + 0.5
    near = CURVE[bits][0] * u + CURVE[bits][1] * u**5
    assert (near - torch.tensor(LEVELS[bits])).abs().max() < 0.4


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_codes_take_no_more_than_their_bits_and_come_back(dtype, dim):
    bits = BITS[dtype]
    codes = encode(normal(30, dim), dtype)
    assert codes.data.shape == (30, dim * bits // 8) and codes.minimum is None
    numbers = torch.cat(channel_parts(codes.data, dtype), -1)
    levels = torch.tensor([*(-x for x in reversed(LEVELS[bits])), *LEVELS[bits]]).float()
    middles = (levels[1:] + levels[:-1]) / 2
    own = turned(normal(30, dim), dtype)
    unit = own.double().square().mean(-1, keepdim=True).sqrt() / UNITS[bits]
    nearest = levels[torch.bucketize((own / unit).float(), middles)]
    assert (numbers != nearest).float().mean() < 1e-3  # what lies on an edge may go either way
    fitted = (own * numbers).sum(-1) / numbers.square().sum(-1)
    torch.testing.assert_close(codes.scale[:, 0].float(), fitted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("dtype", "lost"), [("rot4", 0.0105), ("rot3", 0.037), ("rot2", 0.125)])
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
def test_what_is_lost_does_not_depend_on_the_channels(dtype, lost, dim):
    """A few channels may hold nearly everything: the rotation evens them out."""
    x = normal(500, dim) * torch.exp(normal(dim, seed=1) * 1.5)
    error = (roundtrip(x, dtype) - x).square().sum() / x.square().sum()
    assert float(error) < lost


@pytest.mark.parametrize("dtype", BITS)
def test_least_squares_lets_no_factor_lose_less(dtype):
    x = normal(40, 64)
    back = roundtrip(x, dtype)
    best = (x * back).sum(-1) / back.square().sum(-1)
    torch.testing.assert_close(best, torch.ones(40), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", BITS)
def test_the_ends(dtype):
    zero = torch.zeros(1, 64)
    assert torch.equal(roundtrip(zero, dtype), zero)
    huge = normal(4, 64) * 1e37
    assert roundtrip(huge, dtype).isfinite().all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = normal(3, 64)
        x[1, 5] = bad
        back = roundtrip(x, dtype)
        assert back[1].isnan().all() and back[[0, 2]].isfinite().all()
    small = normal(4, 64) * 1e-4
    error = (roundtrip(small, dtype) - small).square().sum() / small.square().sum()
    assert float(error) < 0.15


def test_widths_that_fill_no_byte_are_refused():
    with pytest.raises(ValueError, match="rot3 in 1 groups cannot hold vectors of 12"):
        encode(torch.zeros(2, 12), "rot3")
    with pytest.raises(ValueError, match="one scale"):
        encode(torch.zeros(2, 64), "rot4", 2)
    assert {name: storage.multiple for name, storage in STORAGES.items()} == {
        "model": 1, "int8": 1, "int4": 2, "fp8": 1, "rot4": 2, "rot3": 8, "rot2": 4,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", BITS)
def test_turned_queries_meet_codes_as_they_lie(dtype):
    keys, query = encode(normal(20, 96), dtype), normal(3, 96, seed=2)
    numbers = torch.cat(channel_parts(keys.data, dtype), -1) * keys.scale.float()
    expected = query.double() @ decode(keys, dtype, 96).double().T
    found = turned(query, dtype).double() @ numbers.double().T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
