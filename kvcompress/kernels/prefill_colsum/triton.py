"""`prefill_colsum` in Triton: a program holds a tile of keys and walks the query rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.triton_tiles import capped, operand_types

_TILE = {2: (64, 32), 4: (32, 16)}  # keys and query rows by bytes of an element


@triton.jit
def _colsum(
    Q, q_b, q_h, q_r, K, k_b, k_h, k_t, LSE, POS, WEIGHT, FIRST, OUT, rows, keys, scaling, softcap,
    D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_s // H, i_s % H
    first = tl.program_id(0) * BN
    o_n, o_r, o_d = first + tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, DP)
    m_n, m_d = o_n < keys, o_d < D
    p_k = K + i_b * k_b + i_h * k_h + o_n.to(tl.int64)[:, None] * k_t + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0).to(T)
    real = m_n & (o_n >= tl.load(FIRST + i_b))
    b_sum = tl.zeros((BN,), tl.float32)
    for r in range(0, rows, BR):
        row = r + o_r
        m_r = row < rows
        position = tl.load(POS + row, mask=m_r, other=-1)
        oldest = tl.min(tl.where(m_r, position, 1 << 30), 0)
        if (tl.max(position, 0) >= first) & ((WINDOW == 0) | (oldest - WINDOW < first + BN)):
            weight = tl.load(WEIGHT + i_b * rows + row, mask=m_r, other=0.0)
            visible = (o_n[:, None] <= position[None, :]) & real[:, None]
            if WINDOW > 0:
                visible = visible & (o_n[:, None] > position[None, :] - WINDOW)
            for g in range(0, G):
                head = i_h * G + g
                p_q = Q + i_b * q_b + head * q_h + row.to(tl.int64)[None, :] * q_r + o_d[:, None]
                b_q = tl.load(p_q, mask=m_r[None, :] & m_d[:, None], other=0.0).to(T)
                b_s = tl.dot(b_k, b_q, input_precision="ieee") * scaling
                b_s = capped(b_s, softcap, SOFTCAP)
                lse = tl.load(LSE + (i_b * H * G + head) * rows + row, mask=m_r, other=0.0)
                p = tl.where(visible, tl.exp(b_s - lse[None, :]), 0.0)
                b_sum += tl.sum(p * weight[None, :], 1)
    tl.store(OUT + i_s * keys + o_n, b_sum, mask=m_n)


def prefill_colsum(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    position: Tensor,
    weight: Tensor,
    first: Tensor,
    scaling: float,
    softcap: float,
    window: int,
) -> Tensor:
    """As `kvcompress.kernels.prefill_colsum.reference.prefill_colsum`."""
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    batch, heads, keys, dim = key.shape
    rows = query.shape[2]
    out = lse.new_empty(batch, heads, keys)
    key_tile, row_tile = _TILE[query.element_size()]
    _colsum[(triton.cdiv(keys, key_tile), batch * heads)](
        query,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        key,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        lse.contiguous(),
        position,
        weight.contiguous(),
        first,
        out,
        rows,
        keys,
        scaling,
        softcap,
        D=dim,
        DP=max(16, triton.next_power_of_2(dim)),
        H=heads,
        G=query.shape[1] // heads,
        BN=key_tile,
        BR=row_tile,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        T=operand_types(query.dtype)[0],
        num_warps=4,
        num_stages=2,
    )
    return out
