"""Chunks, exact tokens and learned sinks of a query row to one softmax, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.triton_tiles import capped, sees

_EXACT_TILE = 16
_CHUNK_TILE = 16


@triton.jit
def _join(b_m, b_l, b_o, tops, totals, numbers):
    """Add parts: tops and totals ``[N]``, numbers ``[N, D]``, to the running softmax of one row."""
    top = tl.maximum(b_m, tl.max(tops, 0))
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(tops == float("-inf"), 0.0, tl.exp(tops - finite))
    keep = tl.exp(b_m - finite)
    b_l = b_l * keep + tl.sum(weight * totals, 0)
    b_o = b_o * keep + tl.sum(weight[:, None] * numbers, 0)
    return top, b_l, b_o


@triton.jit
def _combine(
    Q, q_b, q_h, KEY, k_b, k_h, VALUE, v_b, v_h, EXACT_K, EXACT_V, EXACT_POS, HEADS,
    PO, PM, PL, CHUNKS, START, SEEN, VALID, SINKS, OUT, LSE, LOGITS, scaling, softcap, exact,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    i_s, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_s // H, i_s % H
    head = tl.load(HEADS + i_h)
    now, start = tl.load(SEEN) - 1, tl.load(START + i_b)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < D, o_v < DV
    b_q = tl.load(Q + i_b * q_b + (head * G + i_g) * q_h + o_d, mask=m_d, other=0.0)
    b_q = b_q.to(tl.float32) * scaling
    p_logits = LOGITS + (i_s * G + i_g) * (exact + 1)

    # the token itself
    b_own = tl.load(KEY + i_b * k_b + head * k_h + o_d, mask=m_d, other=0.0).to(tl.float32)
    own = capped(tl.sum(b_q * b_own, 0), softcap, SOFTCAP)
    if HAS_VALID:
        own = tl.where(tl.load(VALID + i_b) != 0, own, float("-inf"))
    tl.store(p_logits + exact, own)
    b_m = own
    b_l = tl.where(own == float("-inf"), 0.0, 1.0)
    b_o = tl.load(VALUE + i_b * v_b + head * v_h + o_v, mask=m_v, other=0.0).to(tl.float32) * b_l
    if HAS_SINKS:
        sink = tl.load(SINKS + head * G + i_g).to(tl.float32)
        top = tl.maximum(b_m, sink)
        b_l = b_l * tl.exp(b_m - top) + tl.exp(sink - top)
        b_o = b_o * tl.exp(b_m - top)
        b_m = top

    o_e = tl.arange(0, BE)
    for e in range(0, exact, BE):
        at = e + o_e
        m_e = at < exact
        row = i_s * exact + at
        b_k = tl.load(EXACT_K + row[:, None] * D + o_d[None, :], mask=m_e[:, None] & m_d[None, :],
                      other=0.0).to(tl.float32)  # fmt: skip
        b_v = tl.load(EXACT_V + row[:, None] * DV + o_v[None, :], mask=m_e[:, None] & m_v[None, :],
                      other=0.0).to(tl.float32)  # fmt: skip
        position = tl.load(EXACT_POS + i_b * exact + at, mask=m_e, other=-1)
        b_s = capped(tl.sum(b_q[None, :] * b_k, 1), softcap, SOFTCAP)
        b_s = tl.where(sees(now, position, start, WINDOW, BLOCK), b_s, float("-inf"))
        tl.store(p_logits + at, b_s, mask=m_e)
        b_m, b_l, b_o = _join(b_m, b_l, b_o, b_s, tl.full((BE,), 1.0, tl.float32), b_v)

    first, count = tl.load(CHUNKS + i_s * 2), tl.load(CHUNKS + i_s * 2 + 1).to(tl.int32)
    o_c = tl.arange(0, BC)
    for c in range(0, count, BC):
        m_c = c + o_c < count
        part = (first + c + o_c) * G + i_g
        tops = tl.load(PM + part, mask=m_c, other=float("-inf"))
        totals = tl.load(PL + part, mask=m_c, other=0.0)
        # the numbers of a chunk that sees nothing are finite: zero
        numbers = tl.load(PO + part[:, None] * DV + o_v[None, :], mask=m_c[:, None] & m_v[None, :],
                          other=0.0)  # fmt: skip
        b_m, b_l, b_o = _join(b_m, b_l, b_o, tops, totals, numbers)

    total = tl.maximum(b_l, 1.1754943508222875e-38)
    tl.store(OUT + (i_b * H * G + head * G + i_g) * DV + o_v,
             (b_o / total).to(OUT.dtype.element_ty), mask=m_v)  # fmt: skip
    tl.store(LSE + i_s * G + i_g, tl.where(b_l > 0, b_m + tl.log(total), float("-inf")))


def decode_combine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    exact_position: Tensor,
    heads: Tensor,
    accumulated: Tensor,
    maximum: Tensor,
    total: Tensor,
    chunks: Tensor,
    start: Tensor,
    seen: Tensor,
    valid: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kvcompress.kernels.decode_combine.flat.decode_combine`."""
    batch, kv_heads, exact, dim = exact_k.shape
    value_dim = exact_v.shape[-1]
    group = query.shape[1] // kv_heads
    out = query.new_empty(batch, 1, kv_heads * group, value_dim)
    lse = maximum.new_empty(batch, kv_heads, group)
    logits = maximum.new_empty(batch, kv_heads, group, exact + 1)
    _combine[(batch * kv_heads, group)](
        query,
        query.stride(0),
        query.stride(1),
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        exact_k,
        exact_v,
        exact_position,
        heads,
        accumulated,
        maximum,
        total,
        chunks,
        start,
        seen,
        seen if valid is None else valid,
        lse if sinks is None else sinks,
        out,
        lse,
        logits,
        scaling,
        softcap,
        exact,
        D=dim,
        DV=value_dim,
        DP=triton.next_power_of_2(dim),
        DVP=triton.next_power_of_2(value_dim),
        H=kv_heads,
        G=group,
        BE=_EXACT_TILE,
        BC=_CHUNK_TILE,
        WINDOW=window,
        BLOCK=block,
        SOFTCAP=softcap > 0,
        HAS_VALID=valid is not None,
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )
    return out, lse, logits
