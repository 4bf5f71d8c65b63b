"""Codes: error bounds, layout, and the inputs that break naive codecs."""

from __future__ import annotations

import pytest
import torch

from kvcompress.quant.codec import (
    Codes,
    channel_parts,
    decode,
    encode,
    roundtrip,
    row_elements,
    value_groups,
)
from kvcompress.quant.codes.steps import packed


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("groups", [1, 2])
def test_integer_codes_are_off_by_half_a_step_at_most(dtype, levels, groups):
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * 7 + 3
    parts = x.unflatten(-1, (groups, -1))
    step = (parts.amax(-1) - parts.amin(-1)) / levels
    error = (roundtrip(x, dtype, groups) - x).unflatten(-1, (groups, -1)).abs().amax(-1)
    # the float16 minimum may lie above the true one by half its spacing, which the top code absorbs
    slack = parts.abs().amax(-1) * 2**-11
    assert (error <= 0.51 * step + slack).all()


def test_fp8_keeps_three_mantissa_bits_and_never_overflows():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 1e4
    back = roundtrip(x, "fp8")
    assert torch.isfinite(back).all()
    assert back[0, 0] == pytest.approx(1e4, rel=2e-3)
    normal = x[1:][x[1:].abs() > 0.1]
    assert ((back[1:][x[1:].abs() > 0.1] - normal).abs() <= normal.abs() * 2**-4 * 1.01).all()


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_a_constant_vector_is_exact(dtype):
    x = torch.tensor([[0.0] * 32, [1.5] * 32, [-448.0] * 32])
    torch.testing.assert_close(roundtrip(x, dtype), x, atol=1e-3, rtol=1e-3)


def test_int4_packs_rope_partners_into_one_byte():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    stored = packed(codes, 2)
    assert stored.shape == (16,)
    assert stored[3] == 3 | (3 << 4)
    assert torch.equal(torch.cat(channel_parts(stored, "int4"), -1), codes)


@pytest.mark.parametrize(
    ("dtype", "dim", "row", "groups"),
    [("int4", 128, 64, 2), ("int4", 80, 40, 2), ("int8", 128, 128, 1)],
)
def test_row_and_groups(dtype, dim, row, groups):
    assert row_elements(dtype, dim) == row
    assert value_groups(dtype, dim) == groups
    assert dim % groups == 0


def test_model_dtype_is_untouched():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    codes = encode(x, "model")
    assert codes == Codes(codes.data, None, None)
    assert codes.data is x
    assert torch.equal(decode(codes, "model", 8), x.float())


def test_an_odd_dimension_is_refused():
    with pytest.raises(ValueError, match="int4 in 1 groups cannot hold vectors of 7"):
        encode(torch.zeros(2, 7), "int4")
