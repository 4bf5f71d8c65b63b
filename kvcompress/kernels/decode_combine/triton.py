"""Pieces, exact tokens and learned sinks of a query row to one softmax, in Triton."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl

from kvcompress.kernels.triton_tiles import capped, sees
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import (
    Combined,
    ExactView,
    HeadsView,
    PartsView,
    Reach,
    RowsView,
    Softmax,
    TokenView,
)

_EXACT_TILE = 16
_CHUNK_TILE = 16


class _Sizes(NamedTuple):
    exact: Annotated[int, "int32"]
    heads: Annotated[int, "int32 constant"]
    queries: Annotated[int, "int32 constant"]
    dim: Annotated[int, "int32 constant"]
    value_dim: Annotated[int, "int32 constant"]
    dim_tile: Annotated[int, "int32 constant"]
    value_tile: Annotated[int, "int32 constant"]
    exact_tile: Annotated[int, "int32 constant"]
    chunk_tile: Annotated[int, "int32 constant"]


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
def _combine(token, exact, heads, parts, rows, softmax, reach, found, sizes):
    H: tl.constexpr = sizes.heads
    G: tl.constexpr = sizes.queries
    D: tl.constexpr = sizes.dim
    DV: tl.constexpr = sizes.value_dim
    i_s, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_s // H, i_s % H
    head = tl.load(heads.number + i_h)
    now, start = tl.load(rows.seen) - 1, tl.load(rows.start + i_b)
    o_d, o_v = tl.arange(0, sizes.dim_tile), tl.arange(0, sizes.value_tile)
    m_d, m_v = o_d < D, o_v < DV
    p_q = token.query.data + i_b * token.query.row + (head * G + i_g) * token.query.head
    b_q = tl.load(p_q + o_d, mask=m_d, other=0.0).to(tl.float32) * softmax.scaling
    p_logits = found.exact_logits + (i_s * G + i_g) * (sizes.exact + 1)

    # the token itself
    p_own = token.key.data + i_b * token.key.row + head * token.key.head
    b_own = tl.load(p_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    own = capped(tl.sum(b_q * b_own, 0), softmax.softcap)
    if rows.valid is not None:
        own = tl.where(tl.load(rows.valid + i_b) != 0, own, float("-inf"))
    tl.store(p_logits + sizes.exact, own)
    b_m = own
    b_l = tl.where(own == float("-inf"), 0.0, 1.0)
    p_own_v = token.value.data + i_b * token.value.row + head * token.value.head
    b_o = tl.load(p_own_v + o_v, mask=m_v, other=0.0).to(tl.float32) * b_l
    if softmax.sinks is not None:
        sink = tl.load(softmax.sinks + head * G + i_g).to(tl.float32)
        top = tl.maximum(b_m, sink)
        b_l = b_l * tl.exp(b_m - top) + tl.exp(sink - top)
        b_o = b_o * tl.exp(b_m - top)
        b_m = top

    o_e = tl.arange(0, sizes.exact_tile)
    for e in range(0, sizes.exact, sizes.exact_tile):
        at = e + o_e
        m_e = at < sizes.exact
        row = (i_s * sizes.exact + at)[:, None]
        m_k, m_x = m_e[:, None] & m_d[None, :], m_e[:, None] & m_v[None, :]
        b_k = tl.load(exact.k + row * D + o_d[None, :], mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(exact.v + row * DV + o_v[None, :], mask=m_x, other=0.0).to(tl.float32)
        position = tl.load(exact.position + i_b * sizes.exact + at, mask=m_e, other=-1)
        b_s = capped(tl.sum(b_q[None, :] * b_k, 1), softmax.softcap)
        b_s = tl.where(sees(now, position, start, reach), b_s, float("-inf"))
        tl.store(p_logits + at, b_s, mask=m_e)
        ones = tl.full((sizes.exact_tile,), 1.0, tl.float32)
        b_m, b_l, b_o = _join(b_m, b_l, b_o, b_s, ones, b_v)

    first, count = tl.load(heads.chunks + i_s * 2), tl.load(heads.chunks + i_s * 2 + 1).to(tl.int32)
    o_c = tl.arange(0, sizes.chunk_tile)
    for c in range(0, count, sizes.chunk_tile):
        m_c = c + o_c < count
        part = (first + c + o_c) * G + i_g
        tops = tl.load(parts.maximum + part, mask=m_c, other=float("-inf"))
        totals = tl.load(parts.total + part, mask=m_c, other=0.0)
        # the numbers of a piece that sees nothing are finite: zero
        p_numbers = parts.accumulated + part[:, None] * DV + o_v[None, :]
        numbers = tl.load(p_numbers, mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_m, b_l, b_o = _join(b_m, b_l, b_o, tops, totals, numbers)

    total = tl.maximum(b_l, 1.1754943508222875e-38)
    p_out = found.out + (i_b * H * G + head * G + i_g) * DV + o_v
    tl.store(p_out, (b_o / total).to(found.out.dtype.element_ty), mask=m_v)
    lse = tl.where(b_l > 0, b_m + tl.log(total), float("-inf"))
    tl.store(found.lse + i_s * G + i_g, lse)


def decode_combine(
    token: TokenView,
    exact: ExactView,
    heads: HeadsView,
    parts: PartsView,
    rows: RowsView,
    softmax: Softmax,
    reach: Reach,
) -> Combined:
    """As `kvcompress.kernels.decode_combine.reference.decode_combine`."""
    batch, kv_heads, held, dim = exact.k.shape
    value_dim = exact.v.shape[-1]
    queries = token.query.shape[1] // kv_heads
    found = Combined(
        token.query.new_empty(batch, 1, kv_heads * queries, value_dim),
        parts.maximum.new_empty(batch, kv_heads, queries),
        parts.maximum.new_empty(batch, kv_heads, queries, held + 1),
    )
    tiles = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    sizes = _Sizes(held, kv_heads, queries, dim, value_dim, *tiles, _EXACT_TILE, _CHUNK_TILE)
    views = (token, exact, heads, parts, rows, softmax, reach, found, sizes)
    _combine[(batch * kv_heads, queries)](*map(told, views), num_warps=4)
    return found
