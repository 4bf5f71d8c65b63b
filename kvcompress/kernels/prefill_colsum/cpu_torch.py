"""Weighted sums of attention columns of a prompt, a block of query rows at a time (PyTorch).

    sums[h, s] = Σ over rows r and the query heads g of h:  weight[r] · A[g, r, s]
`attend_with_sums` gives them with the attention output in one pass over the keys; `row_sums` takes
rows whose normaliser is known, or a few rows, and gives nothing else. Blocks of logits that no row
sees are not computed. All is float32: logits in a narrower type would cost the output its accuracy.

Both take one sequence, and say which keys a row sees as numbers (`Sight`) where they suffice, so
that a compiled kernel can take their place with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.kernels.view import Softmax

BLOCK_ELEMENTS: Final = 1 << 20  # logits at a time on a CPU: 4 MB, stays in its cache
_DEVICE_ELEMENTS: Final = 1 << 25  # elsewhere: few launches, and still small beside a layer
_FEWEST_ROWS, _MOST_ROWS = 16, 256

# (row numbers [n], key numbers [c]) → [n, c] bool, True where the row may not see the key
Hidden = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sight:
    """Which keys rows see: those from `least` to fewer than `most` places back, and not `hidden`.

    Attributes:
        place: ``[R]`` int64 on the CPU, ascending: each row's own place among the keys.
        most: None is all.
        hidden: of the row's number in `place` and the key's place; None hides nothing.
    """

    place: Tensor
    least: int = 0
    most: int | None = None
    hidden: Hidden | None = None

    @property
    def side_by_side(self) -> bool:
        """Whether the rows follow each other without a gap."""
        return not len(self.place) or int(self.place[-1] - self.place[0]) < len(self.place)

    def keys(self, rows: slice) -> range:
        """Keys that some of `rows` may see."""
        first, last = int(self.place[rows.start]), int(self.place[rows.stop - 1])
        low = 0 if self.most is None else max(0, first - self.most + 1)
        return range(low, max(low, last - self.least + 1))

    def hide(self, logits: Tensor, rows: slice, keys: range) -> None:
        """−inf into ``[H, G, n, c]`` logits of `rows` and `keys` where a row does not see."""
        # the first keys are seen by all rows, where nothing but the order of tokens hides any
        seen = 0
        if self.most is None and self.hidden is None:
            seen = max(0, min(len(keys), int(self.place[rows.start]) - self.least + 1 - keys.start))
        device = logits.device
        key = torch.arange(keys.start + seen, keys.stop, device=device)
        place = self.place[rows].to(device)[:, None]
        hidden = key > place - self.least
        if self.most is not None:
            hidden |= key <= place - self.most
        if self.hidden is not None:
            hidden |= self.hidden(torch.arange(rows.start, rows.stop, device=device), key)
        logits[..., seen:].masked_fill_(hidden, -torch.inf)


def attend_with_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    sight: Sight,
    weight: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
) -> Tensor | None:
    """Attention of one sequence, its normalisers, and its column sums.

    Args:
        query: ``[Hq, T, D]``.
        key, value: ``[Hkv, S, D]`` and ``[Hkv, S, Dv]``.
        weight: ``[T]`` float32 of each row's attention; None wants no sums.
        out: ``[T, Hq, Dv]``, written; 0 for a row that sees nothing.
        normaliser: ``[Hq, T]`` float32, written: log Σ exp of the logits, sinks included.

    Returns:
        ``[Hkv, S]`` float32, or None.
    """
    groups = query.shape[0] // key.shape[0]
    sums = None if weight is None else key.new_zeros(*key.shape[:2], dtype=torch.float32)
    read: slice | None = None
    for heads, rows, keys, logits in _Blocks(query, key, softmax, sight):
        if heads != read:
            read, values = heads, value[heads].float()
        own = slice(heads.start * groups, heads.stop * groups)
        top = logits.amax(-1, keepdim=True)  # [H, G, n, 1]
        if softmax.sinks is not None:
            sinks = softmax.sinks[own].float().view(-1, groups, 1, 1)
            top = torch.maximum(top, sinks)
        top.masked_fill_(top == -torch.inf, 0.0)
        logits.sub_(top).exp_()
        total = logits.sum(-1, keepdim=True)
        if softmax.sinks is not None:
            total += torch.exp(sinks - top)
        normaliser[own, rows] = (total.log() + top).squeeze(-1).flatten(0, 1)
        total.clamp_(min=torch.finfo(torch.float32).tiny)
        seen = logits.flatten(1, 2)
        block = torch.bmm(seen, values[:, keys.start : keys.stop])
        block = block.unflatten(1, (groups, -1)).div_(total)
        out[rows, own] = block.flatten(0, 1).transpose(0, 1).to(out.dtype)
        if sums is not None and weight is not None:
            share = (weight[rows].view(1, 1, -1, 1) / total).flatten(1).unsqueeze(1)
            sums[heads, keys.start : keys.stop] += torch.bmm(share, seen).squeeze(1)
    return sums


def row_sums(
    query: Tensor,
    key: Tensor,
    softmax: Softmax,
    sight: Sight,
    weight: Tensor,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Column sums of some rows of one sequence.

    Args:
        query: ``[Hq, R, D]`` the rows'.
        key: ``[Hkv, S, D]``.
        sight: which keys are summed.
        weight: ``[R]`` float32; rows of weight 0 have no part, whatever they hold.
        normaliser: ``[Hq, R]`` float32 over all keys that the rows see, sinks included; None: that
            of the keys in `sight`.

    Returns:
        ``[Hkv, S]`` float32.
    """
    groups = query.shape[0] // key.shape[0]
    sums = key.new_zeros(*key.shape[:2], dtype=torch.float32)
    for heads, rows, keys, logits in _Blocks(query, key, softmax, sight):
        own = slice(heads.start * groups, heads.stop * groups)
        if normaliser is None:
            known = _normaliser(logits, softmax, own)
        else:
            known = normaliser[own, rows].unflatten(0, (-1, groups)).unsqueeze(-1)
        counted = weight[rows] != 0
        known = known.masked_fill(~counted[:, None] | (known == -torch.inf), torch.inf)
        seen = logits.sub_(known).exp_().flatten(1, 2)
        share = weight[rows].repeat(groups).expand(seen.shape[0], 1, -1)
        sums[heads, keys.start : keys.stop] += torch.bmm(share, seen).squeeze(1)
    return sums


def _normaliser(logits: Tensor, softmax: Softmax, own: slice) -> Tensor:
    """``[H, G, n, 1]``."""
    known = logits.logsumexp(-1, keepdim=True)
    if softmax.sinks is None:
        return known
    sinks = softmax.sinks[own].float().view(-1, logits.shape[1], 1, 1)
    return torch.logaddexp(known, sinks)


class _Blocks:
    """Logits ``[H, G, n, c]`` of a few KV heads and rows at a time, −inf where a row does not see.

    They lie in one buffer, which the next block overwrites.
    """

    def __init__(self, query: Tensor, key: Tensor, softmax: Softmax, sight: Sight) -> None:
        self.query, self.key, self.softmax, self.sight = query, key, softmax, sight
        self.heads, keys = key.shape[:2]
        self.groups = query.shape[0] // self.heads
        most = _MOST_ROWS
        if sight.most is not None and sight.side_by_side:
            # a block of n rows has most + n keys, of which each row sees `most`
            most = max(_FEWEST_ROWS, min(most, sight.most))
            keys = min(keys, sight.most + most)
        limit = BLOCK_ELEMENTS if key.device.type == "cpu" else _DEVICE_ELEMENTS
        rows = max(_FEWEST_ROWS, min(most, limit // max(1, self.groups * keys)))
        self.rows = max(1, min(rows, query.shape[1]))
        self.step = max(1, min(self.heads, limit // max(1, self.groups * self.rows * keys)))
        self.size = self.step * self.groups * self.rows * keys

    def __iter__(self) -> Iterator[tuple[slice, slice, range, Tensor]]:
        """(KV heads, rows, keys, logits)."""
        count, dim = self.query.shape[1:]
        buffer = torch.empty(self.size, device=self.key.device)
        for head in range(0, self.heads, self.step):
            heads = slice(head, min(self.heads, head + self.step))
            key = self.key[heads].float()
            query = self.query[heads.start * self.groups : heads.stop * self.groups]
            query = query.unflatten(0, (-1, self.groups))
            for low in range(0, count, self.rows):
                rows = slice(low, min(count, low + self.rows))
                keys = self.sight.keys(rows)
                if not keys:
                    continue
                block = query[:, :, rows].float() * self.softmax.scaling
                shape = (len(key), self.groups * (rows.stop - low), len(keys))
                out = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                seen = key[:, keys.start : keys.stop]
                torch.bmm(block.reshape(*shape[:2], dim), seen.mT, out=out)
                if self.softmax.softcap is not None:
                    out.div_(self.softmax.softcap).tanh_().mul_(self.softmax.softcap)
                logits = out.unflatten(1, (self.groups, -1))
                self.sight.hide(logits, rows, keys)
                yield heads, rows, keys, logits
