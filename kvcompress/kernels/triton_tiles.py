"""What the Triton kernels share: stored words to numbers and numbers to codes, sight.

Rows of codes are read as 16-bit words, so that matrix units get them by the same loads as bfloat16
numbers. A word of a row holds `parts_of` codes, each of another channel (see `channel_of`):

    model  1   the number itself
    int8   2   channels 2w and 2w + 1
    fp8    2   the same
    int4   4   channels 2w, 2w + D/2, 2w + 1, 2w + 1 + D/2

Levels of rotated vectors (rot4, rot3, rot2) are read a byte for each channel instead, from the
first cache after the first channel of a byte, and made of their codes by `CURVE` in float32.

A part becomes float16 exactly by bit operations: an integer below 1024 in the mantissa of 1024.0,
less 1024 and less the middle code, which `zero_of` gives back; e4m3 bits as float16 bits of 2**-8
times the number. ASM packs two elements into each instruction; the plain form beside it gives the
same bits and is what the interpreter runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompress.kernels.available import interpreting
from kvcompress.quant.codes.rotated import CURVE, LEVELS

MODEL = tl.constexpr("model")
INT8 = tl.constexpr("int8")
INT4 = tl.constexpr("int4")
FP8 = tl.constexpr("fp8")
PARTS = {"model": 1, "int8": 2, "int4": 4, "fp8": 2, "rot4": 1, "rot3": 1, "rot2": 1}
LEVEL_BITS = {"rot4": 4, "rot3": 3, "rot2": 2}


def operand_types(dtype):
    """(type of the model's own numbers, type of codes) as operands of the matrix units.

    A float32 model is served in float32. The interpreter cannot multiply bfloat16, so it does
    that in float32 too.
    """
    if dtype == torch.float32:
        return tl.float32, tl.float32
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16, tl.float16
    return tl.float16, tl.float16


@triton.constexpr_function
def parts_of(kind):
    """Codes in a word."""
    return PARTS[kind]


@triton.constexpr_function
def words_of(kind, dim):
    """Words of a row of `dim` channels, or its channels where levels are read."""
    return dim // PARTS[kind]


@triton.constexpr_function
def row_of(kind, dim):
    """Elements from one row to the next."""
    return dim * LEVEL_BITS[kind] // 8 if kind in LEVEL_BITS else dim // PARTS[kind]


@triton.constexpr_function
def level_bits(kind):
    """Bits of a code of a level; 0 for what is no level."""
    return LEVEL_BITS[kind] if kind in LEVEL_BITS else 0


@triton.constexpr_function
def low_bits(kind):
    """Of them, those that lie in the first part of a row; rot3 has its third ones behind them."""
    return 4 if kind == "rot4" else 2


@triton.constexpr_function
def curve_of(bits, place):
    return CURVE[bits][place]


@triton.constexpr_function
def middle_of(bits, place):
    """Between the levels `place` and `place` + 1."""
    levels = [*(-level for level in reversed(LEVELS[bits])), *LEVELS[bits]]
    return (levels[place] + levels[place + 1]) / 2


@triton.constexpr_function
def factor_of(kind, part):
    """Number over what `widen` gives: the high nibble is left where it lies, times 16."""
    if kind == "fp8":
        return 256.0
    return 1 / 16 if kind == "int4" and part % 2 else 1.0


@triton.constexpr_function
def zero_of(kind):
    """Code that `widen` gives as 0."""
    return 128.0 if kind == "int8" else 8.0 if kind == "int4" else 0.0


@triton.jit
def channel_of(word, kind: tl.constexpr, part: tl.constexpr, D: tl.constexpr):
    """Channels of a part of the words."""
    if kind == MODEL or level_bits(kind) > 0:
        return word
    elif kind == INT4:
        return 2 * word + part // 2 + (part % 2) * (D // 2)
    else:
        return 2 * word + part


@triton.constexpr_function
def unpacking(kind, part):
    """Instructions that make a part of two words, in one register, two float16 numbers."""
    if kind == "fp8":
        move = (
            "shl.b32 s, $1, 8; shl.b32 t, $1, 7; and.b32 s, s, 0x80008000;"
            if part == 0
            else "shr.u32 t, $1, 1; and.b32 s, $1, 0x80008000;"
        )
        return "{ .reg .b32 s, t; " + move + " lop3.b32 $0, t, 0x3f803f80, s, 0xEA; }"
    if kind == "int8" and part == 1:
        pick = "prmt.b32 t, $1, 0x64646464, 0x4341;"
    else:
        mask = "0x00ff00ff" if kind == "int8" else "0x00f000f0" if part % 2 else "0x000f000f"
        move = "shr.u32 t, $1, 8;" if part // 2 else "mov.b32 t, $1;"
        pick = move + " lop3.b32 t, t, " + mask + ", 0x64006400, 0xEA;"
    bias = "0x64086408" if kind == "int4" and part % 2 == 0 else "0x64806480"
    return "{ .reg .b32 t, c; mov.b32 c, " + bias + "; " + pick + " sub.f16x2 $0, t, c; }"


@triton.jit
def level_of(code, BITS: tl.constexpr):
    """Levels as float32, exactly: rounding takes away what the curve is off by."""
    u = code.to(tl.float32) - ((1 << BITS) - 1) / 2
    square = u * u
    near = u * (curve_of(BITS, 0) + curve_of(BITS, 1) * square * square)
    return (near + 12582912.0) - 12582912.0


@triton.jit
def load_rows(p, slot, o, m_n, m_w, codes):
    """Rows of codes ``[slots, words]``: words, or the code of each channel."""
    KIND: tl.constexpr = codes.dtype
    D: tl.constexpr = codes.dim
    row: tl.constexpr = row_of(KIND, D)
    m = m_n[:, None] & m_w[None, :]
    p_row = p + slot[:, None] * row
    if level_bits(KIND) > 0:
        low: tl.constexpr = low_bits(KIND)
        part: tl.constexpr = D * low // 8
        byte = tl.load(p_row + (o % part)[None, :], mask=m, other=0).to(tl.int32)
        x = (byte >> (low * (o // part))[None, :]) & ((1 << low) - 1)
        if level_bits(KIND) > low:
            third = tl.load(p_row + (o // 8 + part)[None, :], mask=m, other=0).to(tl.int32)
            x = x | (((third >> (o % 8)[None, :]) & 1) << 2)
    else:
        x = tl.load(p_row + o[None, :], mask=m, other=0.0)
    return x


@triton.jit
def widen(x, kind: tl.constexpr, part: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """A part of words ``x`` as numbers of type T, see `factor_of` and `zero_of`."""
    if kind == MODEL:
        return x.to(T)
    elif level_bits(kind) > 0:
        return level_of(x, level_bits(kind)).to(T)
    elif ASM and T == tl.float16:
        return tl.inline_asm_elementwise(
            unpacking(kind, part), "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    elif kind == FP8:
        if part == 0:
            bits = ((x << 8) & -32768) | ((x << 7) & 0x3F80)
        else:
            bits = (x & -32768) | ((x >> 1) & 0x3F80)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(T)
    else:
        if kind == INT8:
            code = (x >> (8 * part)) & 255
            bias = 1152.0
        else:
            code = (x >> (8 * (part // 2))) & (240 if part % 2 else 15)
            bias = 1152.0 if part % 2 else 1032.0
        return ((code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - bias).to(T)


# ---- what a query sees
@triton.jit
def sees(now, position, start, reach):
    """Whether the architecture lets the query at `now` see a stored token; −1 is none."""
    seen = position >= 0
    if reach.window > 0:
        seen = seen & (position > now - reach.window)
    if reach.block > 0:
        seen = seen & (((position - start) // reach.block) == ((now - start) // reach.block))
    return seen


@triton.jit
def capped(logit, softcap):
    """softcap·tanh(logit / softcap), with tanh by exp; None caps nothing."""
    if softcap is not None:
        logit = softcap - 2.0 * softcap / (tl.exp(2.0 * logit / softcap) + 1.0)
    return logit


@triton.jit
def power_below(x):
    """Largest power of two at most `x` ≥ 0, at least 2**-100: scaling by it rounds nothing."""
    bits = tl.maximum(x, 7.888609052210118e-31).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(power):
    """One over a normal power of two, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


# ---- numbers to codes, bit for bit as `kvcompress.quant.codec.encode`
@triton.jit
def round_even(x):
    """`x` in [0, 2**22) to the nearest integer, halves to even."""
    return (x + 8388608.0) - 8388608.0


@triton.jit
def scale_of(span, sound, LEVELS: tl.constexpr):
    """float16 scale of values that span `span`: never zero or infinite, NaN where not `sound`."""
    scale = tl.div_rn(span, tl.zeros_like(span) + LEVELS)
    scale = tl.minimum(tl.maximum(scale, 6.103515625e-05), 65504.0)
    return tl.where(sound, scale, float("nan")).to(tl.float16)


@triton.jit
def finite(x):
    """Whether numbers are neither NaN nor infinite."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def integer_codes(x, low, scale, LEVELS: tl.constexpr):
    """Codes 0..LEVELS of `x`, as int32; `low` and `scale` are float16 numbers in float32."""
    steps = tl.div_rn(x - low, scale + tl.zeros_like(x))
    return round_even(tl.minimum(tl.maximum(steps, 0.0), LEVELS)).to(tl.int32)


@triton.jit
def e4m3_bits(x):
    """e4m3 bits of `x` in [−448, 448], rounded to nearest, halves to even, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = round_even(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 128)
