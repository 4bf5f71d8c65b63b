"""Split-KV attention of one query per row over flat slots of codes, in Triton.

One program takes one (segment, chunk) of the work list, so a long head is many programs and a short
one few. Tiles are turned: tokens × queries, where the queries of a KV head fill the short side of
the matrix units (8 columns) and stored words their long side. Codes are exact in float16, the
query is scaled by a power of two into its range, weights of values by the chunk's largest scale, so
neither overflows nor falls below it. Sums are float32.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.available import interpreting
from kvcompress.kernels.triton_tiles import (
    MODEL,
    capped,
    channel_of,
    factor_of,
    inverse_of,
    level_bits,
    load_rows,
    operand_types,
    parts_of,
    power_below,
    row_of,
    sees,
    widen,
    words_of,
    zero_of,
)
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.tuning import SplitConfig, split_config, words
from kvcompress.kernels.view import (
    CodesView,
    GroupView,
    HeadsView,
    PartsView,
    PiecesView,
    Reach,
    RowsView,
    Softmax,
    TokenView,
)
from kvcompress.quant.codes.rotated import matrix

_TOP = tl.constexpr(16384.0)  # of a value weight in float16


class _Sizes(NamedTuple):
    """Attributes:
    queries, query_tile: of a KV head, and the matrix units' columns for them.
    k_words, v_words: lanes for the words of a row.
    tokens: of a tile; longest: slots of a piece, as a power of two.
    k_type, v_type: operands of the matrix units.
    packed: whether instructions that only a GPU has widen the codes.
    """

    scored_slots: Annotated[int, "int32"]
    heads: Annotated[int, "int32"]
    queries: Annotated[int, "int32 constant"]
    query_tile: Annotated[int, "int32 constant"]
    k_words: Annotated[int, "int32 constant"]
    v_words: Annotated[int, "int32 constant"]
    tokens: Annotated[int, "int32 constant"]
    longest: Annotated[int, "int32 constant"]
    k_type: Annotated[tl.dtype, "type constant"]
    v_type: Annotated[tl.dtype, "type constant"]
    packed: Annotated[bool, "int32 constant"]


class _Queries(NamedTuple):
    """Attributes:
    turned: as they meet rotated keys, heads in the arrays' order; None where no key is rotated.
    logits: written, see `decode_pieces`.
    """

    turned: Annotated[Tensor | None, "float32 [B, H, G, D]"]
    logits: Annotated[Tensor | None, "float32 [G, Ns]"]


@triton.jit
def _query_part(p_q, p_center, p_scale, channel, m_wg, m_w):
    """A part of the query ``[words, G]`` times the key scale, and its product with the centre."""
    q = tl.load(p_q[None, :] + channel[:, None], mask=m_wg, other=0.0).to(tl.float32)
    center = tl.load(p_center + channel, mask=m_w, other=0.0)
    scale = tl.load(p_scale + channel, mask=m_w, other=0.0)
    return q * scale[:, None], tl.sum(q * center[:, None], 0)


@triton.jit
def _value_part(acc, weights, x, o_w, group: tl.constexpr, part: tl.constexpr, codes, sizes):
    """Add a part of the values, in so far as its channels are of the group."""
    V: tl.constexpr = codes.dtype
    D: tl.constexpr = codes.dim
    GROUPS: tl.constexpr = codes.groups
    T: tl.constexpr = sizes.v_type
    ASM: tl.constexpr = sizes.packed
    half: tl.constexpr = D // 2
    width: tl.constexpr = D // GROUPS
    first: tl.constexpr = (part % 2) * half
    if GROUPS == 1:
        acc = tl.dot(tl.trans(widen(x, V, part, T, ASM)), weights, acc, input_precision="ieee")
    elif group * width < first + half and (group + 1) * width > first:
        number = widen(x, V, part, T, ASM)
        if group * width > first or (group + 1) * width < first + half:
            own = channel_of(o_w, V, part, D) // width == group
            number = tl.where(own[None, :], number, 0.0)
        acc = tl.dot(tl.trans(number), weights, acc, input_precision="ieee")
    return acc


@triton.jit
def _store_part(
    PO, acc, minimum, o_w, o_g, m_wg, part: tl.constexpr, V: tl.constexpr, D: tl.constexpr
):
    channel = channel_of(o_w, V, part, D)
    number = acc * factor_of(V, part) + minimum
    tl.store(PO + o_g[None, :] * D + channel[:, None], number, mask=m_wg)


@triton.jit
def _weigh(p, p_vs, p_vm, slot, m_n, unit, group: tl.constexpr, codes, T: tl.constexpr):
    """Weights of a group's codes in type T, and what their minimum adds per token."""
    V: tl.constexpr = codes.dtype
    GROUPS: tl.constexpr = codes.groups
    if V == MODEL:
        return p.to(T), p
    else:
        scale = tl.load(p_vs + slot * GROUPS + group, mask=m_n, other=0.0).to(tl.float32)
        added = p
        if zero_of(V) > 0:
            low = tl.load(p_vm + slot * GROUPS + group, mask=m_n, other=0.0).to(tl.float32)
            added = p * (low + zero_of(V) * scale)[:, None]
        return (p * (scale * unit)[:, None]).to(T), added


@triton.jit
def _split(token, heads, group, pieces, rows, softmax, reach, parts, own, sizes):
    K: tl.constexpr = group.k.dtype
    V: tl.constexpr = group.v.dtype
    D: tl.constexpr = group.k.dim
    DV: tl.constexpr = group.v.dim
    GROUPS: tl.constexpr = group.v.groups
    G: tl.constexpr = sizes.queries
    GP: tl.constexpr = sizes.query_tile
    WV: tl.constexpr = sizes.v_words
    BN: tl.constexpr = sizes.tokens
    TK: tl.constexpr = sizes.k_type
    TV: tl.constexpr = sizes.v_type
    ASM: tl.constexpr = sizes.packed
    KW: tl.constexpr = words_of(K, D)
    VW: tl.constexpr = words_of(V, DV)
    PK: tl.constexpr = parts_of(K)
    PV: tl.constexpr = parts_of(V)
    i_w = tl.program_id(0).to(tl.int64)
    first, count = tl.load(pieces.work + i_w * 4), tl.load(pieces.work + i_w * 4 + 1).to(tl.int32)
    row, head = tl.load(pieces.work + i_w * 4 + 2), tl.load(pieces.work + i_w * 4 + 3)
    now, start = tl.load(rows.seen) - 1, tl.load(rows.start + row)
    o_g, o_k, o_v = tl.arange(0, GP), tl.arange(0, sizes.k_words), tl.arange(0, WV)
    o_n, m_g = tl.arange(0, BN), o_g < G

    # b_q*: [WK, GP], a part of the query each
    p_q = token.query.data + row * token.query.row
    p_q = p_q + (tl.load(heads.number + head) * G + o_g) * token.query.head
    p_center, p_scale = heads.constants.center + head * D, heads.constants.scale + head * D
    m_k = o_k < KW
    m_kg = m_k[:, None] & m_g[None, :]
    c_0 = channel_of(o_k, K, 0, D)
    b_q0, b_offset = _query_part(p_q, p_center, p_scale, c_0, m_kg, m_k)
    if own.turned is not None:
        p_turned = own.turned + ((row * sizes.heads + head) * G + o_g) * D
        b_q0 = tl.load(p_turned[None, :] + o_k[:, None], mask=m_kg, other=0.0)
    b_top, b_sum = tl.max(tl.abs(b_q0), 0), tl.zeros((GP,), tl.float32)
    b_q1, b_q2, b_q3 = b_q0, b_q0, b_q0
    if PK > 1:
        c_1 = channel_of(o_k, K, 1, D)
        b_q1, more = _query_part(p_q, p_center, p_scale, c_1, m_kg, m_k)
        b_top, b_offset = tl.maximum(b_top, tl.max(tl.abs(b_q1), 0)), b_offset + more
    if PK > 2:
        c_2, c_3 = channel_of(o_k, K, 2, D), channel_of(o_k, K, 3, D)
        b_q2, more = _query_part(p_q, p_center, p_scale, c_2, m_kg, m_k)
        b_top, b_offset = tl.maximum(b_top, tl.max(tl.abs(b_q2), 0)), b_offset + more
        b_q3, more = _query_part(p_q, p_center, p_scale, c_3, m_kg, m_k)
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
    b_top = b_top * softmax.scaling
    b_sum = b_sum * b_top
    b_top = b_top * factor_of(K, 0)
    b_offset = b_offset * softmax.scaling

    # what the segment holds lies in its first slots: the end of it is the last token that is seen
    o_c = tl.arange(0, sizes.longest)
    held = tl.load(group.position + first + o_c, mask=o_c < count, other=-1)
    n = tl.max(tl.where(sees(now, held, start, reach), o_c + 1, 0), 0)
    unit = 1.0
    if V != MODEL:
        largest = tl.zeros((), tl.float32)
        for part in tl.static_range(GROUPS):
            scales = tl.load(group.v.scale + (first + o_c) * GROUPS + part, mask=o_c < n, other=0.0)
            largest = tl.maximum(largest, tl.max(scales.to(tl.float32), 0))
        unit = _TOP / tl.maximum(largest, 6.103515625e-05)

    b_m = tl.full((GP,), float("-inf"), tl.float32)
    b_l = tl.zeros((BN, GP), tl.float32)
    b_low0 = tl.zeros((BN, GP), tl.float32)
    b_low1, b_low2, b_low3 = b_low0, b_low0, b_low0
    b_o0 = tl.zeros((WV, GP), tl.float32)
    b_o1, b_o2, b_o3 = b_o0, b_o0, b_o0
    m_v = o_v < VW
    p_k = group.k.data + first * row_of(K, D)
    p_v = group.v.data + first * row_of(V, DV)
    p_position = group.position + first
    p_ks, p_km, p_vs, p_vm = p_k, p_k, p_v, p_v  # read where there is a scale and a minimum
    if K != MODEL:
        p_ks = group.k.scale + first
    if zero_of(K) > 0:
        p_km = group.k.minimum + first
    if V != MODEL:
        p_vs = group.v.scale + first * GROUPS
    if zero_of(V) > 0:
        p_vm = group.v.minimum + first * GROUPS
    for t in range(0, n, BN):
        slot = t + o_n
        m_n = slot < n
        x_k = load_rows(p_k, slot, o_k, m_n, m_k, group.k)
        x_v = load_rows(p_v, slot, o_v, m_n, m_v, group.v)
        position = tl.load(p_position + slot, mask=m_n, other=-1)
        # b_s: [BN, GP]
        b_s = tl.dot(widen(x_k, K, 0, TK, ASM), b_h0, input_precision="ieee")
        if PK > 1:
            b_s = tl.dot(widen(x_k, K, 1, TK, ASM), b_h1, b_s, input_precision="ieee")
        if PK > 2:
            b_s = tl.dot(widen(x_k, K, 2, TK, ASM), b_h2, b_s, input_precision="ieee")
            b_s = tl.dot(widen(x_k, K, 3, TK, ASM), b_h3, b_s, input_precision="ieee")
        if K == MODEL:
            b_s = b_s * b_top[None, :] + b_offset[None, :]
        else:
            scale = tl.load(p_ks + slot, mask=m_n, other=0.0).to(tl.float32)
            b_s = b_s * (scale[:, None] * b_top[None, :]) + b_offset[None, :]
            if zero_of(K) > 0:
                low = tl.load(p_km + slot, mask=m_n, other=0.0).to(tl.float32)
                b_s += (low + zero_of(K) * scale)[:, None] * b_sum[None, :]
        b_s = capped(b_s, softmax.softcap)
        b_s = tl.where(sees(now, position, start, reach)[:, None], b_s, float("-inf"))
        if own.logits is not None:
            at = (first + slot)[:, None]
            tl.store(
                own.logits + o_g[None, :] * sizes.scored_slots + at,
                b_s,
                mask=m_g[None, :] & (m_n[:, None] & (at < sizes.scored_slots)),
            )
        b_next = tl.maximum(b_m, tl.max(b_s, 0))
        finite = tl.where(b_next == float("-inf"), 0.0, b_next)
        keep = tl.exp(b_m - finite)[None, :]
        p = tl.exp(b_s - finite[None, :])
        b_l = b_l * keep + p
        w, added = _weigh(p, p_vs, p_vm, slot, m_n, unit, 0, group.v, TV)
        if zero_of(V) > 0:
            b_low0 = b_low0 * keep + added
        b_o0 = _value_part(b_o0 * keep, w, x_v, o_v, 0, 0, group.v, sizes)
        if PV > 1:
            b_o1 = _value_part(b_o1 * keep, w, x_v, o_v, 0, 1, group.v, sizes)
        if PV > 2:
            b_o2 = _value_part(b_o2 * keep, w, x_v, o_v, 0, 2, group.v, sizes)
            b_o3 = _value_part(b_o3 * keep, w, x_v, o_v, 0, 3, group.v, sizes)
        for part in tl.static_range(1, GROUPS):
            w, added = _weigh(p, p_vs, p_vm, slot, m_n, unit, part, group.v, TV)
            if part == 1:
                b_low1 = b_low1 * keep + added
            if part == 2:
                b_low2 = b_low2 * keep + added
            if part == 3:
                b_low3 = b_low3 * keep + added
            b_o0 = _value_part(b_o0, w, x_v, o_v, part, 0, group.v, sizes)
            b_o1 = _value_part(b_o1, w, x_v, o_v, part, 1, group.v, sizes)
            b_o2 = _value_part(b_o2, w, x_v, o_v, part, 2, group.v, sizes)
            b_o3 = _value_part(b_o3, w, x_v, o_v, part, 3, group.v, sizes)
        b_m = b_next

    i_w += pieces.first_work
    p_o = parts.accumulated + i_w * G * DV
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
            for scaled in tl.static_range(GROUPS):
                lows = b_low0
                if scaled == 1:
                    lows = b_low1
                if scaled == 2:
                    lows = b_low2
                if scaled == 3:
                    lows = b_low3
                here = channel_of(o_v, V, part, DV) // (DV // GROUPS) == scaled
                b_low += tl.where(here[:, None], tl.sum(lows, 0)[None, :], 0.0)
        _store_part(p_o, b_o * back, b_low, o_v, o_g, m_vg, part, V, DV)
    tl.store(parts.maximum + i_w * G + o_g, b_m, mask=m_g)
    tl.store(parts.total + i_w * G + o_g, tl.sum(b_l, 0), mask=m_g)


def decode_pieces(
    token: TokenView,
    heads: HeadsView,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    softmax: Softmax,
    reach: Reach,
    parts: PartsView,
    logits: Tensor | None,
    config: SplitConfig | None = None,
) -> None:
    """As `kvcompress.kernels.decode_split.reference.decode_pieces`.

    Args:
        config: None is what the table has for this device; its `chunk_tokens` is not used here.
    """
    if not len(pieces.work):
        return
    k, v, queries = group.k, group.v, parts.accumulated.shape[1]
    device = token.query.device
    config = config or split_config(k.dtype, v.dtype, max(k.dim, v.dim), device)
    model, codes = operand_types(token.query.dtype)
    sizes = _Sizes(
        0 if logits is None else logits.shape[1],
        len(heads.number),
        queries,
        max(8, triton.next_power_of_2(queries)),
        max(16, triton.next_power_of_2(words_of(k.dtype, k.dim))),
        max(16, triton.next_power_of_2(words_of(v.dtype, v.dim))),
        config.tokens,
        triton.next_power_of_2(pieces.longest),
        model if k.dtype == "model" else codes,
        model if v.dtype == "model" else codes,
        not interpreting(),
    )
    turned = _turned(token, heads) if level_bits(k.dtype) else None
    group = group._replace(k=_in_words(k), v=_in_words(v))
    views = map(told, (token, heads, group, pieces, rows, softmax, reach, parts))
    settings = {"num_warps": config.warps, "num_stages": config.stages}
    own = told(_Queries(turned, logits))
    _split[(len(pieces.work),)](*views, own, told(sizes), **settings)
    if level_bits(v.dtype):
        rotated = parts.accumulated[pieces.first_work :][: len(pieces.work)]
        rotated.copy_(rotated @ matrix(v.dim, device))


def _turned(token: TokenView, heads: HeadsView) -> Tensor:
    """``[B, H, G, D]`` float32 queries as they meet rotated keys, heads in the arrays' order."""
    query = token.query[:, :, 0].unflatten(1, (len(heads.number), -1))[:, heads.number].float()
    query = query * heads.constants.scale.unsqueeze(1)
    return (query @ matrix(query.shape[-1], query.device)).contiguous()


def _in_words(codes: CodesView) -> CodesView:
    return codes._replace(data=words(codes.data, codes.dtype))
