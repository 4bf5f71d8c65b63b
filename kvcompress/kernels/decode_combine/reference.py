"""One softmax from the parts that `decode_split` gives (online softmax, arXiv 1805.02867)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.decode_split.reference import Partial


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
