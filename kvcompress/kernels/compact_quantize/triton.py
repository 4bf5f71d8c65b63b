"""`compact_quantize` in Triton: tiles of kept tokens, of keys and of values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.triton_encode import encode_rows, row_tile
from kvcompress.kernels.triton_tiles import KINDS
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes

_TILE = 16


@triton.jit
def _compact(
    X, x_b, x_h, x_t, KEPT, SLOTS, CENTER, CONSTANT, DATA, SCALE, MIN, count,
    KIND: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = at < count
    row = tl.load(KEPT + at, mask=m_t, other=0)
    head = tl.load(KEPT + count + at, mask=m_t, other=0)
    token = tl.load(KEPT + 2 * count + at, mask=m_t, other=0)
    slot = tl.load(SLOTS + at, mask=m_t, other=0)
    encode_rows(X + row * x_b + head * x_h + token * x_t, CENTER + head * D, CONSTANT + head * D,
                m_t, DATA, SCALE, MIN, slot, KIND, GROUPS, D, WIDE, CENTERED)  # fmt: skip


def compact_quantize(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    slots: Tensor,
    center: Tensor,
    key_scale: Tensor,
    keys: Codes,
    values: Codes,
    k_dtype: KVDtype,
    v_dtype: KVDtype,
) -> None:
    """As `kvcompress.kernels.compact_quantize.reference.compact_quantize`."""
    count = len(slots)
    if not count:
        return
    for x, codes, dtype in ((key, keys, k_dtype), (value, values, v_dtype)):
        x = x if x.stride(-1) == 1 else x.contiguous()
        dim, missing = x.shape[-1], slots
        data = codes.data.view(torch.uint8) if codes.data.element_size() == 1 else codes.data
        _compact[(triton.cdiv(count, _TILE),)](
            x,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            kept.contiguous(),
            slots,
            center,
            key_scale,
            data,
            missing if codes.scale is None else codes.scale,
            missing if codes.minimum is None else codes.minimum,
            count,
            KIND=KINDS[dtype],
            GROUPS=1 if codes.scale is None else codes.scale.shape[-1],
            D=dim,
            WIDE=row_tile(dtype, dim),
            BT=_TILE,
            CENTERED=codes is keys,
            num_warps=4,
        )
