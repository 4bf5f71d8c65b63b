"""Split-KV attention of one query per row over flat slots of codes, in Triton.

One program takes one (segment, chunk) of the work list, so a long head is many programs and a short
one few. Tiles are turned: tokens × queries, where the queries of a KV head fill the short side of
the matrix units (8 columns) and stored words their long side. Codes are exact in float16, the
query is scaled by a power of two into its range, weights of values by the chunk's largest scale, so
neither overflows nor falls below it. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.available import interpreting
from kvcompress.kernels.triton_tiles import (
    KINDS,
    MODEL,
    capped,
    channel_of,
    factor_of,
    inverse_of,
    operand_types,
    parts_of,
    power_below,
    sees,
    widen,
    words_of,
    zero_of,
)
from kvcompress.kernels.tuning import SplitConfig, split_config, words
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes

_TOP = tl.constexpr(16384.0)  # of a value weight in float16


@triton.jit
def _query_part(
    Q, CENTER, SCALE, o_w, o_g, m_wg, m_w, q_g, part: tl.constexpr, K: tl.constexpr, D: tl.constexpr
):
    """A part of the query ``[words, G]`` times the key scale, and its product with the centre."""
    channel = channel_of(o_w, K, part, D)
    q = tl.load(Q + o_g[None, :] * q_g + channel[:, None], mask=m_wg, other=0.0).to(tl.float32)
    center = tl.load(CENTER + channel, mask=m_w, other=0.0)
    scale = tl.load(SCALE + channel, mask=m_w, other=0.0)
    return q * scale[:, None], tl.sum(q * center[:, None], 0)


@triton.jit
def _value_part(
    acc, weights, x, o_w, group: tl.constexpr, part: tl.constexpr, V: tl.constexpr,
    GROUPS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a part of the values, in so far as its channels are of the group."""
    half: tl.constexpr = D // 2
    width: tl.constexpr = D // GROUPS
    first: tl.constexpr = (part % 2) * half
    if GROUPS == 1:
        acc = tl.dot(tl.trans(widen(x, V, part, T, ASM)), weights, acc, input_precision=PRECISION)
    elif group * width < first + half and (group + 1) * width > first:
        number = widen(x, V, part, T, ASM)
        if group * width > first or (group + 1) * width < first + half:
            own = channel_of(o_w, V, part, D) // width == group
            number = tl.where(own[None, :], number, 0.0)
        acc = tl.dot(tl.trans(number), weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_part(
    PO, acc, minimum, o_w, o_g, m_wg, part: tl.constexpr, V: tl.constexpr, D: tl.constexpr
):
    channel = channel_of(o_w, V, part, D)
    number = acc * factor_of(V, part) + minimum
    tl.store(PO + o_g[None, :] * D + channel[:, None], number, mask=m_wg)


@triton.jit
def _weigh(p, VS, VM, slot, m_n, unit, group: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
           T: tl.constexpr):  # fmt: skip
    """Weights of a group's codes in type T, and what their minimum adds per token."""
    if V == MODEL:
        return p.to(T), p
    else:
        scale = tl.load(VS + slot * GROUPS + group, mask=m_n, other=0.0).to(tl.float32)
        added = p
        if zero_of(V) > 0:
            low = tl.load(VM + slot * GROUPS + group, mask=m_n, other=0.0).to(tl.float32)
            added = p * (low + zero_of(V) * scale)[:, None]
        return (p * (scale * unit)[:, None]).to(T), added


@triton.jit
def _split(
    Q, q_b, q_h, q_g, HEADS, CENTER, SCALE, KD, KS, KM, VD, VS, VM, POS, WORK, START, SEEN,
    PO, PM, PL, LOGITS, first_work, scored_slots, scaling, softcap,
    D: tl.constexpr, DV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr, STORE: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr,
    ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    KW: tl.constexpr = words_of(K, D)
    VW: tl.constexpr = words_of(V, DV)
    PK: tl.constexpr = parts_of(K)
    PV: tl.constexpr = parts_of(V)
    i_w = tl.program_id(0).to(tl.int64)
    first, count = tl.load(WORK + i_w * 4), tl.load(WORK + i_w * 4 + 1).to(tl.int32)
    row, head = tl.load(WORK + i_w * 4 + 2), tl.load(WORK + i_w * 4 + 3)
    now, start = tl.load(SEEN) - 1, tl.load(START + row)
    o_g, o_k, o_v, o_n = tl.arange(0, GP), tl.arange(0, WK), tl.arange(0, WV), tl.arange(0, BN)
    m_g = o_g < G

    # b_q*: [WK, GP], a part of the query each
    p_q = Q + row * q_b + tl.load(HEADS + head) * q_h
    p_center, p_scale = CENTER + head * D, SCALE + head * D
    m_k = o_k < KW
    m_kg = m_k[:, None] & m_g[None, :]
    b_q0, b_offset = _query_part(p_q, p_center, p_scale, o_k, o_g, m_kg, m_k, q_g, 0, K, D)
    b_top, b_sum = tl.max(tl.abs(b_q0), 0), tl.zeros((GP,), tl.float32)
    b_q1, b_q2, b_q3 = b_q0, b_q0, b_q0
    if PK > 1:
        b_q1, more = _query_part(p_q, p_center, p_scale, o_k, o_g, m_kg, m_k, q_g, 1, K, D)
        b_top, b_offset = tl.maximum(b_top, tl.max(tl.abs(b_q1), 0)), b_offset + more
    if PK > 2:
        b_q2, more = _query_part(p_q, p_center, p_scale, o_k, o_g, m_kg, m_k, q_g, 2, K, D)
        b_top, b_offset = tl.maximum(b_top, tl.max(tl.abs(b_q2), 0)), b_offset + more
        b_q3, more = _query_part(p_q, p_center, p_scale, o_k, o_g, m_kg, m_k, q_g, 3, K, D)
        b_top, b_offset = tl.maximum(b_top, tl.max(tl.abs(b_q3), 0)), b_offset + more
    b_top = power_below(b_top)
    b_unit = inverse_of(b_top)[None, :]
    # the sum is of the rounded query, so that rounding cancels in scale·(q·code) + minimum·Σq
    b_h0 = (b_q0 * b_unit).to(TK)
    b_sum += tl.sum(b_h0.to(tl.float32), 0)
    b_h1, b_h2, b_h3 = b_h0, b_h0, b_h0
    if PK > 1:
        b_h1 = (b_q1 * b_unit).to(TK)
        b_sum += tl.sum(b_h1.to(tl.float32), 0)
    if PK > 2:
        b_h2, b_h3 = (b_q2 * b_unit).to(TK), (b_q3 * b_unit).to(TK)
        b_sum += tl.sum(b_h2.to(tl.float32), 0) + tl.sum(b_h3.to(tl.float32), 0)
    if PK > 1:
        b_h1 = (b_h1.to(tl.float32) * factor_of(K, 1) / factor_of(K, 0)).to(TK)
    if PK > 2:
        b_h3 = (b_h3.to(tl.float32) * factor_of(K, 3) / factor_of(K, 0)).to(TK)
    b_top = b_top * scaling
    b_sum = b_sum * b_top
    b_top = b_top * factor_of(K, 0)
    b_offset = b_offset * scaling

    # what the segment holds lies in its first slots: the end of it is the last token that is seen
    o_c = tl.arange(0, CHUNK)
    held = tl.load(POS + first + o_c, mask=o_c < count, other=-1)
    n = tl.max(tl.where(sees(now, held, start, WINDOW, BLOCK), o_c + 1, 0), 0)
    unit = 1.0
    if V != MODEL:
        largest = tl.zeros((), tl.float32)
        for group in tl.static_range(GROUPS):
            scales = tl.load(VS + (first + o_c) * GROUPS + group, mask=o_c < n, other=0.0)
            largest = tl.maximum(largest, tl.max(scales.to(tl.float32), 0))
        unit = _TOP / tl.maximum(largest, 6.103515625e-05)

    b_m = tl.full((GP,), float("-inf"), tl.float32)
    b_l = tl.zeros((BN, GP), tl.float32)
    b_low0 = tl.zeros((BN, GP), tl.float32)
    b_low1, b_low2, b_low3 = b_low0, b_low0, b_low0
    b_o0 = tl.zeros((WV, GP), tl.float32)
    b_o1, b_o2, b_o3 = b_o0, b_o0, b_o0
    m_v = o_v < VW
    p_k, p_v = KD + first * KW, VD + first * VW
    p_pos, p_ks, p_km = POS + first, KS + first, KM + first
    p_vs, p_vm = VS + first * GROUPS, VM + first * GROUPS
    for t in range(0, n, BN):
        slot = t + o_n
        m_n = slot < n
        x_k = tl.load(
            p_k + slot[:, None] * KW + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0
        )
        x_v = tl.load(
            p_v + slot[:, None] * VW + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0
        )
        position = tl.load(p_pos + slot, mask=m_n, other=-1)
        # b_s: [BN, GP]
        b_s = tl.dot(widen(x_k, K, 0, TK, ASM), b_h0, input_precision=PRECISION)
        if PK > 1:
            b_s = tl.dot(widen(x_k, K, 1, TK, ASM), b_h1, b_s, input_precision=PRECISION)
        if PK > 2:
            b_s = tl.dot(widen(x_k, K, 2, TK, ASM), b_h2, b_s, input_precision=PRECISION)
            b_s = tl.dot(widen(x_k, K, 3, TK, ASM), b_h3, b_s, input_precision=PRECISION)
        if K == MODEL:
            b_s = b_s * b_top[None, :] + b_offset[None, :]
        else:
            scale = tl.load(p_ks + slot, mask=m_n, other=0.0).to(tl.float32)
            b_s = b_s * (scale[:, None] * b_top[None, :]) + b_offset[None, :]
            if zero_of(K) > 0:
                low = tl.load(p_km + slot, mask=m_n, other=0.0).to(tl.float32)
                b_s += (low + zero_of(K) * scale)[:, None] * b_sum[None, :]
        b_s = capped(b_s, softcap, SOFTCAP)
        b_s = tl.where(sees(now, position, start, WINDOW, BLOCK)[:, None], b_s, float("-inf"))
        if STORE:
            at = (first + slot)[:, None]
            tl.store(
                LOGITS + o_g[None, :] * scored_slots + at,
                b_s,
                mask=m_g[None, :] & (m_n[:, None] & (at < scored_slots)),
            )
        b_next = tl.maximum(b_m, tl.max(b_s, 0))
        finite = tl.where(b_next == float("-inf"), 0.0, b_next)
        keep = tl.exp(b_m - finite)[None, :]
        p = tl.exp(b_s - finite[None, :])
        b_l = b_l * keep + p
        w, added = _weigh(p, p_vs, p_vm, slot, m_n, unit, 0, V, GROUPS, TV)
        if zero_of(V) > 0:
            b_low0 = b_low0 * keep + added
        b_o0 = _value_part(b_o0 * keep, w, x_v, o_v, 0, 0, V, GROUPS, DV, TV, ASM, PRECISION)
        if PV > 1:
            b_o1 = _value_part(b_o1 * keep, w, x_v, o_v, 0, 1, V, GROUPS, DV, TV, ASM, PRECISION)
        if PV > 2:
            b_o2 = _value_part(b_o2 * keep, w, x_v, o_v, 0, 2, V, GROUPS, DV, TV, ASM, PRECISION)
            b_o3 = _value_part(b_o3 * keep, w, x_v, o_v, 0, 3, V, GROUPS, DV, TV, ASM, PRECISION)
        for group in tl.static_range(1, GROUPS):
            w, added = _weigh(p, p_vs, p_vm, slot, m_n, unit, group, V, GROUPS, TV)
            if group == 1:
                b_low1 = b_low1 * keep + added
            if group == 2:
                b_low2 = b_low2 * keep + added
            if group == 3:
                b_low3 = b_low3 * keep + added
            b_o0 = _value_part(b_o0, w, x_v, o_v, group, 0, V, GROUPS, DV, TV, ASM, PRECISION)
            b_o1 = _value_part(b_o1, w, x_v, o_v, group, 1, V, GROUPS, DV, TV, ASM, PRECISION)
            b_o2 = _value_part(b_o2, w, x_v, o_v, group, 2, V, GROUPS, DV, TV, ASM, PRECISION)
            b_o3 = _value_part(b_o3, w, x_v, o_v, group, 3, V, GROUPS, DV, TV, ASM, PRECISION)
        b_m = b_next

    i_w += first_work
    p_o = PO + i_w * G * DV
    m_vg = m_v[:, None] & m_g[None, :]
    back = 1.0 / unit
    for part in tl.static_range(PV):
        b_o = b_o0
        if part == 1:
            b_o = b_o1
        if part == 2:
            b_o = b_o2
        if part == 3:
            b_o = b_o3
        b_low = tl.zeros((WV, GP), tl.float32)
        if zero_of(V) > 0:
            for group in tl.static_range(GROUPS):
                lows = b_low0
                if group == 1:
                    lows = b_low1
                if group == 2:
                    lows = b_low2
                if group == 3:
                    lows = b_low3
                own = channel_of(o_v, V, part, DV) // (DV // GROUPS) == group
                b_low += tl.where(own[:, None], tl.sum(lows, 0)[None, :], 0.0)
        _store_part(p_o, b_o * back, b_low, o_v, o_g, m_vg, part, V, DV)
    tl.store(PM + i_w * G + o_g, b_m, mask=m_g)
    tl.store(PL + i_w * G + o_g, tl.sum(b_l, 0), mask=m_g)


def decode_split(
    query: Tensor,
    heads: Tensor,
    center: Tensor,
    key_scale: Tensor,
    keys: Codes,
    values: Codes,
    k_dtype: KVDtype,
    v_dtype: KVDtype,
    position: Tensor,
    work: Tensor,
    start: Tensor,
    seen: Tensor,
    accumulated: Tensor,
    maximum: Tensor,
    total: Tensor,
    logits: Tensor | None,
    first_work: int,
    scaling: float,
    softcap: float,
    window: int,
    block: int,
    chunk: int,
    config: SplitConfig | None = None,
) -> None:
    """As `kvcompress.kernels.decode_split.flat.decode_split`.

    Args:
        config: None is what the table has for this device; its `chunk_tokens` is not used here.
    """
    if not len(work):
        return
    dim, value_dim = query.shape[-1], accumulated.shape[-1]
    group = accumulated.shape[1]
    config = config or split_config(k_dtype, v_dtype, max(dim, value_dim), query.device)
    model, codes = operand_types(query.dtype)
    missing = position  # never read
    groups = 1 if values.scale is None else values.scale.shape[-1]
    _split[(len(work),)](
        query,
        query.stride(0),
        query.stride(1) * group,
        query.stride(1),
        heads,
        center,
        key_scale,
        words(keys.data, k_dtype),
        missing if keys.scale is None else keys.scale,
        missing if keys.minimum is None else keys.minimum,
        words(values.data, v_dtype),
        missing if values.scale is None else values.scale,
        missing if values.minimum is None else values.minimum,
        position,
        work,
        start,
        seen,
        accumulated,
        maximum,
        total,
        maximum if logits is None else logits,
        first_work,
        0 if logits is None else logits.shape[1],
        scaling,
        softcap,
        D=dim,
        DV=value_dim,
        K=KINDS[k_dtype],
        V=KINDS[v_dtype],
        GROUPS=groups,
        G=group,
        GP=max(8, triton.next_power_of_2(group)),
        WK=max(16, triton.next_power_of_2(words_of(KINDS[k_dtype], dim))),
        WV=max(16, triton.next_power_of_2(words_of(KINDS[v_dtype], value_dim))),
        BN=config.tokens,
        CHUNK=triton.next_power_of_2(chunk),
        WINDOW=window,
        BLOCK=block,
        SOFTCAP=softcap > 0,
        STORE=logits is not None,
        TK=model if k_dtype == "model" else codes,
        TV=model if v_dtype == "model" else codes,
        ASM=not interpreting(),
        PRECISION="ieee",
        num_warps=config.warps,
        num_stages=config.stages,
    )
