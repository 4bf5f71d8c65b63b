"""`prefill_colsum` in Triton: a program holds a tile of keys and walks the query rows."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.triton_tiles import capped, operand_types
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import Reach, Softmax, VotersView

_TILE = {2: (64, 32), 4: (32, 16)}  # keys and query rows by bytes of an element


class _Sizes(NamedTuple):
    rows: Annotated[int, "int32"]
    keys: Annotated[int, "int32"]
    heads: Annotated[int, "int32 constant"]
    queries: Annotated[int, "int32 constant"]
    dim: Annotated[int, "int32 constant"]
    dim_tile: Annotated[int, "int32 constant"]
    key_tile: Annotated[int, "int32 constant"]
    row_tile: Annotated[int, "int32 constant"]
    operand: Annotated[tl.dtype, "type constant"]


@triton.jit
def _colsum(voters, softmax, reach, out, sizes):
    H: tl.constexpr = sizes.heads
    G: tl.constexpr = sizes.queries
    BN: tl.constexpr = sizes.key_tile
    T: tl.constexpr = sizes.operand
    query, key = voters.query, voters.key
    i_s = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_s // H, i_s % H
    first = tl.program_id(0) * BN
    o_n, o_r = first + tl.arange(0, BN), tl.arange(0, sizes.row_tile)
    o_d = tl.arange(0, sizes.dim_tile)
    m_n, m_d = o_n < sizes.keys, o_d < sizes.dim
    p_k = key.data + i_b * key.row + i_h * key.head
    p_k = p_k + o_n.to(tl.int64)[:, None] * key.token + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0).to(T)
    real = m_n & (o_n >= tl.load(voters.first + i_b))
    b_sum = tl.zeros((BN,), tl.float32)
    for r in range(0, sizes.rows, sizes.row_tile):
        row = r + o_r
        m_r = row < sizes.rows
        position = tl.load(voters.position + row, mask=m_r, other=-1)
        oldest = tl.min(tl.where(m_r, position, 1 << 30), 0)
        near = (reach.window == 0) | (oldest - reach.window < first + BN)
        if (tl.max(position, 0) >= first) & near:
            weight = tl.load(voters.weight + i_b * sizes.rows + row, mask=m_r, other=0.0)
            visible = (o_n[:, None] <= position[None, :]) & real[:, None]
            if reach.window > 0:
                visible = visible & (o_n[:, None] > position[None, :] - reach.window)
            for g in range(0, G):
                head = i_h * G + g
                p_q = query.data + i_b * query.row + head * query.head
                p_q = p_q + row.to(tl.int64)[None, :] * query.token + o_d[:, None]
                b_q = tl.load(p_q, mask=m_r[None, :] & m_d[:, None], other=0.0).to(T)
                b_s = tl.dot(b_k, b_q, input_precision="ieee") * softmax.scaling
                b_s = capped(b_s, softmax.softcap)
                p_lse = voters.lse + (i_b * H * G + head) * sizes.rows + row
                lse = tl.load(p_lse, mask=m_r, other=0.0)
                p = tl.where(visible, tl.exp(b_s - lse[None, :]), 0.0)
                b_sum += tl.sum(p * weight[None, :], 1)
    tl.store(out + i_s * sizes.keys + o_n, b_sum, mask=m_n)


def prefill_colsum(voters: VotersView, softmax: Softmax, reach: Reach) -> Tensor:
    """As `kvcompress.kernels.prefill_colsum.reference.prefill_colsum`."""
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in voters[:2])
    batch, heads, keys, dim = key.shape
    rows, queries = query.shape[2], query.shape[1] // heads
    lse, position, weight, first = voters[2:]
    voters = VotersView(query, key, lse.contiguous(), position, weight.contiguous(), first)
    out = lse.new_empty(batch, heads, keys)
    tiles = _TILE[query.element_size()]
    wide = max(16, triton.next_power_of_2(dim))
    operand, _ = operand_types(query.dtype)
    sizes = _Sizes(rows, keys, heads, queries, dim, wide, *tiles, operand)
    grid = (triton.cdiv(keys, tiles[0]), batch * heads)
    views = told(voters), told(softmax), told(reach), out, told(sizes)
    _colsum[grid](*views, num_warps=4, num_stages=2)
    return out
