"""`compact_quantize` in Triton: tiles of kept tokens, of keys and of values."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl

from kvcompress.kernels.triton_encode import encode_rows, row_tile
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import CodesView, KeyConstants, PromptView

_TILE = 16


class _Sizes(NamedTuple):
    kept: Annotated[int, "int32"]
    tile: Annotated[int, "int32 constant"]
    wide: Annotated[int, "int32 constant"]


@triton.jit
def _compact(prompt, constants, codes, sizes):
    """Keys; without constants, values."""
    at = tl.program_id(0).to(tl.int64) * sizes.tile + tl.arange(0, sizes.tile)
    m_t = at < sizes.kept
    row = tl.load(prompt.kept + at, mask=m_t, other=0)
    head = tl.load(prompt.kept + sizes.kept + at, mask=m_t, other=0)
    token = tl.load(prompt.kept + 2 * sizes.kept + at, mask=m_t, other=0)
    slot = tl.load(prompt.slot + at, mask=m_t, other=0)
    if constants is not None:
        x = prompt.key
        p_x = x.data + row * x.row + head * x.head + token * x.token
        p_center = constants.center + head * codes.dim
        p_scale = constants.scale + head * codes.dim
        encode_rows(p_x, p_center, p_scale, m_t, codes, slot, sizes.wide)
    else:
        x = prompt.value
        p_x = x.data + row * x.row + head * x.head + token * x.token
        encode_rows(p_x, None, None, m_t, codes, slot, sizes.wide)


def compact_quantize(
    prompt: PromptView, constants: KeyConstants, k: CodesView, v: CodesView
) -> None:
    """As `kvcompress.kernels.compact_quantize.reference.compact_quantize`."""
    count = len(prompt.slot)
    if not count:
        return
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in prompt[:2])
    own = told(PromptView(key, value, prompt.kept.contiguous(), prompt.slot))
    for given, codes in ((told(constants), k), (None, v)):
        sizes = told(_Sizes(count, _TILE, row_tile(codes.dtype, codes.dim)))
        _compact[(triton.cdiv(count, _TILE),)](own, given, told(codes), sizes, num_warps=4)
