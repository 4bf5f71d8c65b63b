"""Attention of a few query rows over coded segments, codes read in place (pure PyTorch).

With keys stored as k = scale·code + minimum, and the key constants already folded into the query,
    logit = scale_t·(q·code_t) + minimum_t·Σq + offset
    out   = Σ_t (p_t·scale_t)·code_t + Σ_t p_t·minimum_t
so nothing of the cache is ever dequantized; a tile of codes is widened at a time. Where codes are
of rotated vectors, the query is rotated first, and the output is rotated back once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

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
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes, channel_parts, turned
from kvcompress.storage import STORAGES

TILE_ELEMENTS: Final = 1 << 20  # of codes widened to float32 at a time: 4 MB, stays in cache


@dataclass(slots=True)
class Partial:
    """Softmax over a part of the keys, to be merged with the other parts.

    Attributes:
        accumulated: ``[S, R, Dv]`` Σ exp(logit − maximum)·v.
        maximum: ``[S, R]`` largest visible logit, −inf where the row sees nothing.
        total: ``[S, R]`` Σ exp(logit − maximum).
        logits: ``[S, R, C]``, −inf where not visible.
    """

    accumulated: Tensor
    maximum: Tensor
    total: Tensor
    logits: Tensor


def decode_split(
    query: Tensor,
    offset: Tensor | None,
    keys: Codes,
    values: Codes,
    k_dtype: KVDtype,
    v_dtype: KVDtype,
    visible: Tensor | None,
    softcap: float | None = None,
) -> Partial:
    """One part of the attention of each segment.

    Args:
        query: ``[S, R, D]`` float32, times the softmax scale and the key scale.
        offset: ``[S, R]`` added to every logit (query · key centre), or None.
        keys, values: codes ``[S, C, row]`` with scale and minimum ``[S, C, groups]``.
        visible: bool, broadcastable to ``[S, R, C]``, or None if every key is.
        softcap: logits become softcap·tanh(logit/softcap), as Gemma 2 does.
    """
    logits = key_logits(query, offset, keys, k_dtype)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    maximum = logits.amax(-1)
    shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = torch.exp(logits - shift.unsqueeze(-1))
    accumulated = weighted_values(weights, values, v_dtype)
    return Partial(accumulated, maximum, weights.sum(-1), logits)


def key_logits(query: Tensor, offset: Tensor | None, keys: Codes, dtype: KVDtype) -> Tensor:
    """``[S, R, C]`` logits before softcap and mask."""
    segments, rows, dim = query.shape
    query, slots = turned(query, dtype), keys.data.shape[1]
    out = query.new_empty(segments, rows, slots)
    for low, high in _tiles(segments, slots, dim):
        data = keys.data[:, low:high]
        target = out[:, :, low:high]
        parts = channel_parts(data, dtype)
        first, *others = zip(query.chunk(len(parts), -1), parts, strict=True)
        torch.bmm(first[0], first[1].float().mT, out=target)
        for piece, part in others:
            target.baddbmm_(piece, part.float().mT)
    if keys.scale is not None:
        out *= keys.scale.float().mT
    if keys.minimum is not None:
        out += query.sum(-1, keepdim=True) * keys.minimum.float().mT
    if offset is not None:
        out += offset.unsqueeze(-1)
    return out


def weighted_values(weights: Tensor, values: Codes, dtype: KVDtype) -> Tensor:
    """``[S, R, Dv]``: Σ_t weights_t · v_t.

    Args:
        weights: ``[S, R, C]`` float32.
    """
    segments, rows, slots = weights.shape
    groups = 1 if values.scale is None else values.scale.shape[-1]
    dim = STORAGES[dtype].channels(values.data.shape[-1])
    out = weights.new_zeros(segments, rows, dim)
    width = dim // groups
    for group in range(groups):
        scaled = weights
        if values.scale is not None:
            scaled = weights * values.scale[..., group].float().unsqueeze(1)
        channels = slice(group * width, (group + 1) * width)
        for low, high in _tiles(segments, slots, dim):
            tile = _value_tile(values.data[:, low:high], dtype, dim, channels)
            out[..., channels] += torch.bmm(scaled[..., low:high], tile)
        if values.minimum is not None:
            shift = torch.bmm(weights, values.minimum[..., group].float().unsqueeze(-1))
            out[..., channels] += shift
    return turned(out, dtype)


def _value_tile(data: Tensor, dtype: KVDtype, dim: int, channels: slice) -> Tensor:
    """``[S, T, channels]`` float32: from each part of a row what lies in `channels`."""
    parts = channel_parts(data, dtype)
    width = dim // len(parts)
    cut = []
    for number, part in enumerate(parts):
        low, high = channels.start - number * width, channels.stop - number * width
        if low < width and high > 0:
            cut.append(part[..., max(0, low) : min(width, high)])
    return cut[0].float() if len(cut) == 1 else torch.cat(cut, -1).float()


def _tiles(segments: int, slots: int, dim: int) -> list[tuple[int, int]]:
    step = max(64, TILE_ELEMENTS // max(1, segments * dim))
    return [(low, min(slots, low + step)) for low in range(0, slots, step)]


# ---- the flat form, of the static cache
def sees(now: Tensor, position: Tensor, start: Tensor, reach: Reach) -> Tensor:
    """Whether the query at `now` may see stored tokens; −1 is none."""
    seen = position >= 0
    if reach.window:
        seen = seen & (position > now - reach.window)
    if reach.block:
        same = (position - start).div(reach.block, rounding_mode="floor")
        seen = seen & (same == (now - start).div(reach.block, rounding_mode="floor"))
    return seen


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
) -> None:
    """`decode_split` of one query per row over every piece of a group.

    Args:
        parts: written from `pieces.first_work` on.
        logits: ``[G, Ns]`` float32, written for slots below Ns that the query may see; or None.
    """
    queries, now = parts.accumulated.shape[1], rows.seen - 1
    center, scale = heads.constants
    for index, (first, slots, row, head) in enumerate(pieces.work.tolist()):
        part = slice(first, first + slots)
        model_head = int(heads.number[head])
        query = token.query[row, model_head * queries :][:queries, 0].float() * softmax.scaling
        visible = sees(now, group.position[part].long(), rows.start[row].long(), reach)
        found = decode_split(
            (query * scale[head])[None],
            (query * center[head]).sum(-1)[None],
            _cut(group.k, part),
            _cut(group.v, part),
            group.k.dtype,
            group.v.dtype,
            visible[None, None],
            softmax.softcap,
        )
        at = pieces.first_work + index
        parts.accumulated[at] = found.accumulated[0]
        parts.maximum[at] = found.maximum[0]
        parts.total[at] = found.total[0]
        if logits is not None and first < logits.shape[1]:
            logits[:, part] = found.logits[0]


def _cut(codes: CodesView, part: slice) -> Codes:
    scale, minimum = (None if t is None else t[part][None] for t in (codes.scale, codes.minimum))
    return Codes(codes.data[part][None], scale, minimum)
