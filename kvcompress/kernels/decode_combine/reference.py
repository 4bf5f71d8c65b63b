"""One softmax from the parts that `decode_split` gives (online softmax, arXiv 1805.02867)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.decode_split.reference import Partial, decode_split, sees
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
from kvcompress.quant.codec import Codes


class Combiner:
    """Running attention output of every (batch row, KV head, query row)."""

    def __init__(self, batch: int, heads: int, rows: int, dim: int, device: torch.device) -> None:
        self.accumulated = torch.zeros(batch, heads, rows, dim, device=device)
        self.maximum = torch.full((batch, heads, rows), -torch.inf, device=device)
        self.total = torch.zeros(batch, heads, rows, device=device)

    def add(self, part: Partial, batch_index: Tensor, head_index: Tensor) -> None:
        """Merge a part; segment s is of row ``batch_index[s]`` and KV head ``head_index[s]``."""
        where = (batch_index, head_index)
        old = self.maximum[where]
        new = torch.maximum(old, part.maximum)
        finite = new.masked_fill(new == -torch.inf, 0.0)
        keep, join = torch.exp(old - finite), torch.exp(part.maximum - finite)
        self.maximum[where] = new
        self.total[where] = self.total[where] * keep + part.total * join
        self.accumulated[where] = self.accumulated[where] * keep.unsqueeze(
            -1
        ) + part.accumulated * join.unsqueeze(-1)

    def add_logits(self, logits: Tensor) -> None:
        """Merge one more logit per KV head and query row, ``[Hkv, R]``, that has no value."""
        logits = logits.float()
        new = torch.maximum(self.maximum, logits)
        keep = torch.exp(self.maximum - new)
        self.total = self.total * keep + torch.exp(logits - new)
        self.accumulated *= keep.unsqueeze(-1)
        self.maximum = new

    def output(self) -> Tensor:
        """``[B, Hkv, R, Dv]`` float32; zero for a row that saw nothing (padding)."""
        return self.accumulated / self.total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(
            -1
        )

    def probabilities(self, logits: Tensor, batch_index: Tensor, head_index: Tensor) -> Tensor:
        """Softmax weights of one part's `logits`, after every part was added."""
        top = self.maximum[batch_index, head_index].unsqueeze(-1)
        top = top.masked_fill(top == -torch.inf, 0.0)
        total = self.total[batch_index, head_index].unsqueeze(-1)
        return torch.exp(logits - top) / total.clamp(min=torch.finfo(torch.float32).tiny)


def decode_combine(
    token: TokenView,
    exact: ExactView,
    heads: HeadsView,
    parts: PartsView,
    rows: RowsView,
    softmax: Softmax,
    reach: Reach,
) -> Combined:
    """Pieces of codes, the exact tokens, the token itself and learned sinks in one softmax.

    Args:
        parts: of all pieces of the layer.
    """
    batch, kv_heads = exact.k.shape[:2]
    query, key, value = (t[:, :, 0] for t in token[:3])
    query = query.unflatten(1, (kv_heads, -1))[:, heads.number].float() * softmax.scaling
    row, head = (t.flatten() for t in torch.meshgrid(
        torch.arange(batch), torch.arange(kv_heads), indexing="ij"
    ))  # fmt: skip
    visible = sees(rows.seen - 1, exact.position.long(), rows.start[:, None].long(), reach)
    own = torch.ones_like(visible[:, :1]) if rows.valid is None else rows.valid[:, None]
    keys, values = (
        Codes(torch.cat([t, new[:, heads.number, None]], 2).flatten(0, 1), None, None)
        for t, new in ((exact.k, key), (exact.v, value))
    )
    part = decode_split(
        query.flatten(0, 1),
        None,
        keys,
        values,
        "model",
        "model",
        torch.cat([visible, own], 1)[row][:, None],
        softmax.softcap,
    )
    queries, value_dim = query.shape[2], exact.v.shape[-1]
    combiner = Combiner(batch, kv_heads, queries, value_dim, query.device)
    combiner.add(part, row, head)
    first, count = heads.chunks.flatten(0, 1).unbind(-1)
    for number in range(int(count.max())):
        has = count > number
        piece = first[has] + number
        accumulated, maximum, total = (t[piece] for t in parts)
        one = Partial(accumulated, maximum, total, part.logits)
        combiner.add(one, row[has], head[has])
    if softmax.sinks is not None:
        combiner.add_logits(softmax.sinks.view(kv_heads, -1)[heads.number])
    out = torch.zeros_like(combiner.accumulated)
    out[:, heads.number] = combiner.output()
    logits = part.logits.unflatten(0, (batch, kv_heads))
    lse = combiner.maximum + combiner.total.log()
    return Combined(out.flatten(1, 2).unsqueeze(1).to(token.query.dtype), lse, logits)
