"""Reference of the flat form of `decode_split`: every piece of a work list by the dense form."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.decode_split import reference
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes


def sees(now: Tensor, position: Tensor, start: Tensor, window: int, block: int) -> Tensor:
    """Whether the query at `now` may see stored tokens: −1 is none, 0 for `window` or `block` is
    no such limit."""
    seen = position >= 0
    if window:
        seen = seen & (position > now - window)
    if block:
        same = (position - start).div(block, rounding_mode="floor")
        seen = seen & (same == (now - start).div(block, rounding_mode="floor"))
    return seen


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
) -> None:
    """Attention of one query per row over each piece of the work list.

    Args:
        query: ``[B, Hq, 1, D]`` as the model gives it.
        heads: ``[H]`` the model's number of each KV head of this layer's own order.
        center, key_scale: ``[H, D]`` float32: a key is centre + scale · code space.
        keys, values: flat codes ``[N, …]``.
        position: ``[N]`` int32, −1 where a slot is empty; a segment fills from its first slot.
        work: ``[W, 4]`` int64 (first slot, slots, row, head), see `tuning.work_list`.
        start: ``[B]`` int32 position of each row's first real token.
        seen: int64 scalar, tokens that have come, the query's own included.
        accumulated, maximum, total: ``[·, G, Dv]``, ``[·, G]``, ``[·, G]`` float32; the parts are
            written from `first_work` on, as in `reference.Partial`.
        logits: ``[G, Ns]`` float32, written for slots below Ns that the query may see; or None.
        softcap: 0 is none.
        window, block: of sliding and of chunked attention, 0 is none.
        chunk: most slots of a piece.
    """
    group = accumulated.shape[1]
    now = seen - 1
    for index, (first, slots, row, head) in enumerate(work.tolist()):
        part = slice(first, first + slots)
        q = query[row, int(heads[head]) * group :][:group, 0].float() * scaling
        visible = sees(now, position[part].long(), start[row].long(), window, block)
        found = reference.decode_split(
            (q * key_scale[head])[None],
            (q * center[head]).sum(-1)[None],
            _cut(keys, part),
            _cut(values, part),
            k_dtype,
            v_dtype,
            visible[None, None],
            softcap or None,
        )
        accumulated[first_work + index] = found.accumulated[0]
        maximum[first_work + index] = found.maximum[0]
        total[first_work + index] = found.total[0]
        if logits is not None and first < logits.shape[1]:
            logits[:, part] = found.logits[0]


def _cut(codes: Codes, part: slice) -> Codes:
    rows = (codes.data, codes.scale, codes.minimum)
    data, scale, minimum = (None if t is None else t[part][None] for t in rows)
    assert isinstance(data, torch.Tensor)
    return Codes(data, scale, minimum)
