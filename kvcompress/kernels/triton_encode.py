"""Vectors to stored rows of codes in Triton, bit for bit as `kvcompress.quant.codec.encode`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.kernels.triton_tiles import (
    FP8,
    INT4,
    INT8,
    e4m3_bits,
    finite,
    integer_codes,
    level_bits,
    level_of,
    low_bits,
    middle_of,
    row_of,
    scale_of,
)
from kvcompress.plan import KVDtype
from kvcompress.quant.codes.rotated import LARGEST, SMALLEST, UNITS

_LARGEST = tl.constexpr(LARGEST)
_SMALLEST = tl.constexpr(SMALLEST)


def row_tile(dtype: KVDtype, dim: int) -> int:
    """WIDE of `encode_rows`: a power of two at least `dim`, or at least dim / 2 for int4."""
    size: int = triton.next_power_of_2(dim // 2 if dtype == "int4" else dim)
    return size


@triton.jit
def _coded(p_x, p_center, p_scale, o, m):
    """Channels `o` of vectors in code space, ``[BT, channels]`` float32."""
    x = tl.load(p_x[:, None] + o[None, :], mask=m, other=0.0).to(tl.float32)
    if p_center is not None:
        center = tl.load(p_center[:, None] + o[None, :], mask=m, other=0.0)
        scale = tl.load(p_scale[:, None] + o[None, :], mask=m, other=1.0)
        x = tl.div_rn(x - center, scale)
    return x


@triton.constexpr_function
def _unit_of(bits):
    return UNITS[bits]


@triton.constexpr_function
def _steps_of(dim):
    return dim.bit_length() - 1


@triton.constexpr_function
def _root_of(dim):
    return dim**-0.5


@triton.jit
def _rotated(x, BT: tl.constexpr, D: tl.constexpr):
    """`x` ``[BT, D]`` as `rotated` turns it, D a power of two."""
    number = (tl.arange(0, D).to(tl.int64) * 0x9E3779B1) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    sign = 1.0 - 2.0 * (number >> 31).to(tl.float32)
    x = x * sign[None, :]
    # pairs of neighbours; the lowest bit of a channel's number then becomes its highest
    for _ in tl.static_range(_steps_of(D)):
        a, b = tl.split(tl.reshape(x, (BT, D // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), 0, 2, 1), (BT, D))
    return x * _root_of(D) * sign[None, :]


@triton.jit
def _encode_levels(x, m_t, codes, slot, BT: tl.constexpr):
    """Store vectors ``[BT, D]`` as levels, see quant/codes/rotated.py."""
    D: tl.constexpr = codes.dim
    BITS: tl.constexpr = level_bits(codes.dtype)
    LOW: tl.constexpr = low_bits(codes.dtype)
    PART: tl.constexpr = D * LOW // 8
    sound = tl.min(finite(x).to(tl.int32), 1) > 0
    x = tl.where(sound[:, None], x, 0.0)
    x = _rotated(tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST), BT, D)
    exact = x.to(tl.float64)
    spread = tl.sqrt(tl.sum(exact * exact, 1) / D)
    spread = tl.where(spread < _SMALLEST, float("inf"), spread)
    factor = (_unit_of(BITS) / spread).to(tl.float32)
    near = x * factor[:, None]
    code = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range((1 << BITS) - 1):
        code += (near > middle_of(BITS, k)).to(tl.int32)
    level = level_of(code, BITS).to(tl.float64)
    fitted = (tl.sum(exact * level, 1) / tl.sum(level * level, 1)).to(tl.float32)
    fitted = tl.where(sound, tl.minimum(fitted, 65504.0), float("nan"))
    tl.store(codes.scale + slot, fitted.to(tl.float16), mask=m_t)
    code = tl.where(sound[:, None], code, 0)
    row: tl.constexpr = row_of(codes.dtype, D)
    p_row = codes.data + slot[:, None] * row
    low = tl.reshape(code & ((1 << LOW) - 1), (BT, 8 // LOW, PART))
    byte = tl.sum(low << (LOW * tl.arange(0, 8 // LOW))[None, :, None], 1)
    tl.store(p_row + tl.arange(0, PART)[None, :], byte.to(tl.uint8), mask=m_t[:, None])
    if BITS > LOW:
        third = tl.reshape(code >> LOW, (BT, D // 8, 8)) << tl.arange(0, 8)[None, None, :]
        byte = tl.sum(third, 2).to(tl.uint8)
        tl.store(p_row + PART + tl.arange(0, D // 8)[None, :], byte, mask=m_t[:, None])


@triton.jit
def encode_rows(p_x, p_center, p_scale, m_t, codes, slot, WIDE: tl.constexpr):
    """Store vectors at flat slots.

    Args:
        p_x: ``[BT]`` pointers to the first channels; p_center, p_scale: to the key constants, None
            for values.
        m_t: ``[BT]`` which of them; slot: ``[BT]`` int64.
        WIDE: see `row_tile`.
    """
    D: tl.constexpr = codes.dim
    GROUPS: tl.constexpr = codes.groups
    o = tl.arange(0, WIDE)
    if level_bits(codes.dtype) > 0:
        m = m_t[:, None] & (o < D)[None, :]
        x = _coded(p_x, p_center, p_scale, o, m)
        _encode_levels(x, m_t, codes, slot, x.shape[0])
    elif codes.dtype == INT4:
        half: tl.constexpr = D // 2
        width: tl.constexpr = D // GROUPS
        m = m_t[:, None] & (o < half)[None, :]
        low_x = _coded(p_x, p_center, p_scale, o, m)
        high_x = _coded(p_x, p_center, p_scale, o + half, m)
        low_code = tl.zeros(low_x.shape, tl.int32)
        high_code = low_code
        for group in tl.static_range(GROUPS):
            in_low = m & (o // width == group)[None, :]
            in_high = m & ((o + half) // width == group)[None, :]
            least = tl.minimum(
                tl.min(tl.where(in_low, low_x, float("inf")), 1),
                tl.min(tl.where(in_high, high_x, float("inf")), 1),
            )
            most = tl.maximum(
                tl.max(tl.where(in_low, low_x, float("-inf")), 1),
                tl.max(tl.where(in_high, high_x, float("-inf")), 1),
            )
            sound = _sound(low_x, in_low) & _sound(high_x, in_high)
            least, scale = _range(least, most, m_t, sound, 15.0)
            tl.store(codes.scale + slot * GROUPS + group, scale, mask=m_t)
            tl.store(codes.minimum + slot * GROUPS + group, least, mask=m_t)
            least, scale = least.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]
            in_low, in_high = in_low & sound[:, None], in_high & sound[:, None]
            low_code = tl.where(in_low, integer_codes(low_x, least, scale, 15.0), low_code)
            high_code = tl.where(in_high, integer_codes(high_x, least, scale, 15.0), high_code)
        byte = (low_code | (high_code << 4)).to(tl.uint8)
        tl.store(codes.data + slot[:, None] * half + o[None, :], byte, mask=m)
    else:
        m = m_t[:, None] & (o < D)[None, :]
        x = _coded(p_x, p_center, p_scale, o, m)
        p_data = codes.data + slot[:, None] * D + o[None, :]
        if codes.dtype == INT8:
            least = tl.min(tl.where(m, x, float("inf")), 1)
            most = tl.max(tl.where(m, x, float("-inf")), 1)
            sound = _sound(x, m)
            least, scale = _range(least, most, m_t, sound, 255.0)
            tl.store(codes.scale + slot, scale, mask=m_t)
            tl.store(codes.minimum + slot, least, mask=m_t)
            least, scale = least.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]
            code = tl.where(sound[:, None], integer_codes(x, least, scale, 255.0), 0)
            tl.store(p_data, code.to(tl.uint8), mask=m)
        elif codes.dtype == FP8:
            sound = _sound(x, m)
            scale = scale_of(tl.max(tl.where(m, tl.abs(x), 0.0), 1), sound, 448.0)
            tl.store(codes.scale + slot, scale, mask=m_t)
            scaled = tl.div_rn(x, scale.to(tl.float32)[:, None] + tl.zeros_like(x))
            scaled = tl.where(sound[:, None], tl.minimum(tl.maximum(scaled, -448.0), 448.0), 0.0)
            tl.store(p_data, e4m3_bits(scaled).to(tl.uint8), mask=m)
        else:
            if codes.data.dtype.element_ty == tl.float16:
                x = _within(x, 65504.0)
            elif codes.data.dtype.element_ty == tl.bfloat16:
                x = _within(x, 3.3895313892515355e38)
            tl.store(p_data, x.to(codes.data.dtype.element_ty), mask=m)


@triton.jit
def _sound(x, m):
    """Whether all of a vector's numbers are finite."""
    return tl.min((finite(x) | (m == 0)).to(tl.int32), 1) > 0


@triton.jit
def _within(x, MOST: tl.constexpr):
    """`x` with its finite numbers clamped."""
    return tl.where(finite(x), tl.minimum(tl.maximum(x, -MOST), MOST), x)


@triton.jit
def _range(least, most, m_t, sound, LEVELS: tl.constexpr):
    """float16 minimum and scale; the codes absorb the rounding of the minimum."""
    least = tl.minimum(tl.maximum(tl.where(m_t & sound, least, 0.0), -65504.0), 65504.0)
    least = least.to(tl.float16)
    span = tl.where(m_t & sound, most, 0.0) - least.to(tl.float32)
    scale = scale_of(span, sound, LEVELS)
    return tl.where(sound, least.to(tl.float32), float("nan")).to(tl.float16), scale
