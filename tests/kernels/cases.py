"""Inputs of the flat kernels, and what they must give, in float64: for any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.tuning import work_list
from kvcompress.kernels.view import (
    CodesView,
    GroupView,
    HeadsView,
    KeyConstants,
    PartsView,
    PiecesView,
    Reach,
    RowsView,
    Softmax,
    TokenView,
)
from kvcompress.quant.codec import (
    Codes,
    decode,
    encode,
    has_minimum,
    row_elements,
    row_torch_dtype,
    value_groups,
)

NOW = 300
# (storage of keys, of values, head_dim, value_dim, query heads per KV head)
SHAPES = [
    ("model", "model", 64, 64, 4),
    ("int8", "int8", 128, 128, 4),
    ("int4", "int4", 128, 128, 1),
    ("fp8", "fp8", 64, 64, 7),
    ("int8", "int4", 80, 96, 3),
    ("int4", "int8", 48, 32, 8),
    ("int4", "int4", 256, 192, 2),
    ("fp8", "int4", 32, 256, 5),
    ("model", "fp8", 96, 80, 6),
    ("int8", "model", 192, 48, 2),
    ("rot4", "rot3", 64, 32, 3),
    ("rot3", "rot2", 128, 64, 1),
    ("int8", "rot4", 96, 128, 4),
    ("rot2", "int4", 32, 80, 2),
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Split:
    """Segments of one group, partly filled, one of them empty; heads in another order."""

    token: TokenView
    heads: HeadsView
    group: GroupView
    pieces: PiecesView
    rows: RowsView
    softmax: Softmax
    reach: Reach
    queries: int
    visible: Tensor
    keys: Tensor  # [N, D] float64 as stored, key constants undone
    values: Tensor

    def outputs(self) -> tuple[PartsView, Tensor]:
        """Poisoned arrays for a kernel to write to, one piece more on either side."""
        pieces, slots = len(self.pieces.work) + 2, len(self.group.position) - 1
        device, rows = self.token.query.device, self.queries

        def poison(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=device)

        parts = poison(pieces, rows, self.values.shape[-1]), poison(pieces, rows)
        return PartsView(*parts, poison(pieces, rows)), poison(rows, slots)

    def run(self, kernel: Any) -> tuple[PartsView, Tensor]:
        """What `kernel` writes, on the CPU."""
        parts, logits = self.outputs()
        views = (self.token, self.heads, self.group, self.pieces, self.rows)
        kernel(*views, self.softmax, self.reach, parts, logits)
        return to(parts, "cpu"), logits.cpu()

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per piece, float64: output ``[W, G, Dv]`` and log of the sum ``[W, G]``; and logits
        ``[G, N]``."""
        rows, (scaling, softcap, _) = self.queries, self.softmax
        out, lse = [], []
        logits = torch.full((rows, len(self.keys)), -torch.inf, dtype=torch.float64)
        for first, slots, row, head in self.pieces.work.tolist():
            part = slice(first, first + slots)
            model_head = int(self.heads.number[head])
            query = self.token.query[row, model_head * rows :][:rows, 0].cpu().double()
            line = query @ self.keys[part].mT * scaling
            if softcap is not None:
                line = torch.tanh(line / softcap) * softcap
            line = line.masked_fill(~self.visible[part], -torch.inf)
            logits[:, part] = line
            out.append(line.softmax(-1).nan_to_num(0.0) @ self.values[part])
            lse.append(line.logsumexp(-1))
        return torch.stack(out), torch.stack(lse), logits


def split(
    k_dtype: str,
    v_dtype: str,
    dim: int,
    value_dim: int,
    rows: int,
    dtype: torch.dtype = torch.float32,
    capacities: tuple[int, ...] = (37, 0, 90),
    batch: int = 1,
    softcap: float | None = None,
    window: int = 0,
    block: int = 0,
    chunk: int = 64,
    device: str = "cpu",
) -> Split:
    heads = len(capacities)
    segments, total = [], 0
    for row in range(batch):
        for head, capacity in enumerate(capacities):
            segments.append((total, capacity, row, head))
            total += capacity
    center, scale = random(heads, dim, seed=1), random(heads, dim, seed=2).abs() + 0.5
    coded = random(total + 1, dim, seed=3).to(dtype)
    keys = encode(coded, k_dtype)
    values = (random(total + 1, value_dim, seed=4) + 0.5).to(dtype)
    values = encode(values, v_dtype, value_groups(v_dtype, value_dim))
    position = torch.full((total + 1,), -1, dtype=torch.int32)
    start = torch.arange(batch, dtype=torch.int32) * 3
    for first, capacity, row, _ in segments:
        filled = capacity - 7 if capacity > 40 else capacity
        order = torch.randperm(NOW - 1, generator=torch.Generator().manual_seed(first))
        position[first : first + filled] = order[:filled].int() + 1 + start[row]
    row_of = torch.zeros(total, dtype=torch.int64)
    head_of = torch.zeros(total, dtype=torch.int64)
    for first, capacity, row, head in segments:
        row_of[first : first + capacity], head_of[first : first + capacity] = row, head
    held, begin = position[:total].long(), start[row_of].long()
    visible = held >= 0
    if window:
        visible &= held > NOW - window
    if block:
        visible &= (held - begin) // block == (NOW - begin) // block
    stored = decode(keys, k_dtype, dim)[:total].double()
    stored = stored * scale[head_of].double() + center[head_of].double()
    work = torch.tensor(work_list(segments, chunk))
    vectors = [
        random(batch, 1, heads * rows, dim, seed=5).to(dtype).transpose(1, 2),
        random(batch, heads, 1, dim, seed=6).to(dtype),
        random(batch, 1, heads, value_dim, seed=7).to(dtype).transpose(1, 2),
    ]
    base = torch.tensor([first for first, *_ in segments]).view(batch, heads)
    codes = CodesView.of(keys, k_dtype, dim), CodesView.of(values, v_dtype, value_dim)
    views = (
        TokenView(*vectors, None),
        HeadsView(
            (torch.arange(heads) + 1) % heads,
            KeyConstants(center, scale),
            chunks_of(work, batch, heads, 1),
        ),
        GroupView(*codes, position, None, None),
        PiecesView(work, base, 0, 1, chunk),
        RowsView(torch.tensor(NOW + 1), start, start, None, None),
        Softmax(dim**-0.5, softcap, None),
        Reach(window, block),
    )
    numbers = decode(values, v_dtype, value_dim)[:total].double()
    return Split(*(to(view, device) for view in views), rows, visible, stored, numbers)


def chunks_of(work: Tensor, batch: int, heads: int, first: int) -> Tensor:
    """``[B, H, 2]`` first piece of each segment, counted from `first`, and their number."""
    chunks = torch.zeros(batch, heads, 2, dtype=torch.int64)
    for number, (_, _, row, head) in enumerate(work.tolist()):
        if not chunks[row, head, 1]:
            chunks[row, head, 0] = first + number
        chunks[row, head, 1] += 1
    return chunks


def to(value: Any, device: str) -> Any:
    """Tensors, codes and views on `device`."""
    if isinstance(value, Codes):
        parts = (value.data, value.scale, value.minimum)
        return Codes(*(to(t, device) for t in parts))
    if isinstance(value, tuple):
        return type(value)(*(to(inner, device) for inner in value))
    return value.to(device) if isinstance(value, Tensor) else value


def check_split(kernel: Any, case: Split, tolerance: float) -> None:
    """Every piece against float64; nothing is written beside the pieces."""
    (parts, found), (out, lse, logits) = case.run(kernel), case.expected()
    pieces = slice(1, 1 + len(out))
    total = parts.total[pieces].double()
    mine = parts.accumulated[pieces].double() / total.clamp(min=1e-30).unsqueeze(-1)
    torch.testing.assert_close(mine, out, atol=tolerance, rtol=tolerance)
    sees = lse > -torch.inf
    mine = parts.maximum[pieces].double() + total.log()
    torch.testing.assert_close(mine[sees], lse[sees], atol=tolerance, rtol=tolerance)
    assert (total[~sees] == 0).all()
    seen = case.visible.expand_as(logits)
    torch.testing.assert_close(found.double()[seen], logits[seen], atol=tolerance, rtol=tolerance)
    for part in parts:
        assert part[0].isnan().all()
        assert part[-1].isnan().all()


def empty_codes(dtype: str, slots: int, dim: int, groups: int, model: torch.dtype) -> CodesView:
    data = torch.zeros(slots, row_elements(dtype, dim), dtype=row_torch_dtype(dtype, model))
    scale = minimum = None
    if dtype != "model":
        scale = torch.zeros(slots, groups, dtype=torch.float16)
        minimum = torch.zeros_like(scale) if has_minimum(dtype) else None
    return CodesView(data, scale, minimum, dtype, dim, groups)


def same_codes(ours: Codes | CodesView, theirs: Codes | CodesView) -> None:
    """Equal to the last bit."""
    for a, b in ((ours.data, theirs.data), (ours.scale, theirs.scale)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
    if ours.minimum is not None and theirs.minimum is not None:
        assert torch.equal(ours.minimum.cpu(), theirs.minimum.cpu())


def awkward(*shape: int, seed: int) -> Tensor:
    """Vectors that round badly: halves, constants, zeros, magnitudes from 1e-6 to 1e3."""
    x = random(*shape, seed=seed)
    x = x * torch.logspace(-6, 3, shape[-2]).unsqueeze(-1)
    x[..., 0, :] = 1.5
    x[..., 1, :] = 0.0
    x[..., 2, :] = torch.arange(shape[-1]) * 0.5
    return x
