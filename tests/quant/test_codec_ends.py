"""The ends of every dtype through every code: finite stays finite within a bound, NaN stays NaN.

The compiled kernels give the same bits; the Triton kernel does in tests/interpreted/test_ends.py.
"""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.cpu.library import ISAS, library
from kvcompress.quant.codec import HALF_MAX, decode, encode, rounded, value_groups
from kvcompress.runtime.prompt.prompt_kernels import encode_kept
from kvcompress.runtime.store.segments import SegmentStore, StorageKind
from tests.kernels.ends import CODES, broken, ends, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIM = 128
LEVELS = {"int8": 255, "int4": 15}
GROUPS = {"int8": 1, "int4": 2, "fp8": 1}


def expected_bound(x: torch.Tensor, code: str) -> torch.Tensor:
    """What each number of ``[N, groups, n]`` float64 may be off by, from the ranges alone."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if code == "fp8":
        top = 448 * HALF_MAX
        size = x.abs().clamp(max=top)
        scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(2.0**-14, HALF_MAX)
        # 3 bits behind the point, below 2^-6 steps of 2^-9; the scale is rounded to 11 bits
        return (x.abs() - top).clamp(min=0) + size * (2.0**-4 + 2.0**-10) + scale * 2.0**-10
    low = least.clamp(-HALF_MAX, HALF_MAX)
    scale = ((most - low) / LEVELS[code]).clamp(2.0**-14, HALF_MAX)
    high = low + LEVELS[code] * scale
    beyond = (low - x).clamp(min=0) + (x - high).clamp(min=0)
    # half a step, the minimum's rounding to 11 bits, the scale's over all levels, float32's own
    slack = low.abs() * 2.0**-11 + LEVELS[code] * scale * 2.0**-11 + 2.0**-24
    return beyond + 0.5 * scale + slack + x.abs() * 2.0**-22


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", GROUPS)
def test_finite_stays_finite_and_near(code, dtype):
    x = ends(dtype, DIM)
    codes = encode(x, code, GROUPS[code])
    assert bool(codes.scale.isfinite().all()) and bool((codes.scale > 0).all())
    back = decode(codes, code, DIM)
    assert bool(back.isfinite().all())
    parts = x.double().unflatten(-1, (GROUPS[code], -1))
    error = (back.double().unflatten(-1, (GROUPS[code], -1)) - parts).abs()
    assert bool((error <= expected_bound(parts, code)).all())


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_an_outlier_reads_as_the_end_and_leaves_the_others_alone(code):
    """A value at −91136, of a real model, gave NaN: its minimum was −inf in float16."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = -91136.0
    back = decode(encode(x, code), code, 64)
    assert torch.equal(back[:, 0], torch.full((4,), -HALF_MAX))
    step = (x.amax(-1, keepdim=True) + HALF_MAX) / LEVELS[code]
    assert bool(((back - x).abs()[:, 1:] <= 0.51 * step + HALF_MAX * 2.0**-11).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", GROUPS)
def test_what_is_not_finite_reads_as_nan_in_its_part(code, dtype):
    x = broken(dtype, DIM)
    groups = GROUPS[code]
    back = decode(encode(x, code, groups), code, DIM).unflatten(-1, (groups, -1))
    sound = x.float().unflatten(-1, (groups, -1)).isfinite().all(-1)
    assert bool(back[~sound].isnan().all())
    assert bool(back[sound].isfinite().all())


def test_ordinary_numbers_have_the_codes_that_they_had():
    """Nothing changed for them: the formula as it was, written out."""
    x = torch.randn(200, DIM, generator=torch.Generator().manual_seed(3)) * 40 + 3
    for code, levels in LEVELS.items():
        parts = x.unflatten(-1, (GROUPS[code], -1))
        low = parts.amin(-1).half()
        scale = ((parts.amax(-1) - low.float()) / levels).clamp(2.0**-14, HALF_MAX).half()
        steps = (parts - low.float()[..., None]) / scale.float()[..., None]
        wanted = steps.round().clamp(0, levels) * scale.float()[..., None] + low.float()[..., None]
        assert torch.equal(decode(encode(x, code, GROUPS[code]), code, DIM), wanted.flatten(-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_finite_number_is_rounded_to_infinity(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([3.4e38, -3.4e38, 70000.0, -1.5, torch.inf, -torch.inf, torch.nan])
    got = rounded(x, dtype)
    assert got.dtype == dtype
    limit = torch.tensor([3.4e38, -3.4e38, 70000.0, -1.5]).clamp(-most, most).to(dtype)
    assert torch.equal(got[:4], limit) and bool(got[:4].isfinite().all())
    assert got[4:6].tolist() == [torch.inf, -torch.inf] and bool(got[6].isnan())
    assert torch.equal(rounded(x[:4], torch.float32), x[:4])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_the_compiled_kernels_give_the_same_bits(code, dtype, isa, request):
    kernels = library()
    if kernels is None:
        pytest.skip("no compiled kernels")
    before = kernels.isa
    request.addfinalizer(lambda: kernels.use_isa(before))
    try:
        kernels.use_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    rows = torch.cat([ends(dtype, DIM), broken(dtype, DIM)])
    key, value = rows[None, None], rows.flip(0)[None, None].contiguous()
    count = len(rows)
    kept = torch.stack([torch.zeros(count), torch.zeros(count), torch.arange(count)]).long()
    center, scale = torch.full((1, DIM), 0.25), torch.full((1, DIM), 0.5)
    store = SegmentStore(StorageKind(code, code, False), DIM, DIM, dtype, rows.device, [[count]])
    assert encode_kept(key, value, kept, kept[2], (center, scale), store)
    own = (rows.float() - 0.25) / 0.5
    own = rounded(own, dtype) if code == "model" else own
    same_bits(store.keys, encode(own, code))
    same_bits(store.values, encode(value[0, 0], code, value_groups(code, DIM)))
