"""Inputs of the flat kernels, and what they must give, in float64: for any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.tuning import work_list
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
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Split:
    """Segments of one group, partly filled, one of them empty; heads in another order."""

    arguments: dict[str, Any]
    segments: list[tuple[int, int, int, int]]
    visible: Tensor
    keys: Tensor  # [N, D] float64 as stored, key constants undone
    values: Tensor

    def outputs(self) -> dict[str, Tensor]:
        """Poisoned arrays for a kernel to write to, one piece more on either side."""
        query, work = self.arguments["query"], self.arguments["work"]
        rows, width = self.arguments["rows"], self.values.shape[-1]
        pieces, slots = len(work) + 2, len(self.keys)

        def poison(*shape: int) -> Tensor:
            return torch.full(shape, torch.nan, device=query.device)

        return {
            "accumulated": poison(pieces, rows, width),
            "maximum": poison(pieces, rows),
            "total": poison(pieces, rows),
            "logits": poison(rows, slots),
        }

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per piece, float64: output ``[W, G, Dv]`` and log of the sum ``[W, G]``; and logits
        ``[G, N]``."""
        a = self.arguments
        out, lse = [], []
        logits = torch.full((a["rows"], len(self.keys)), -torch.inf, dtype=torch.float64)
        for first, slots, row, head in a["work"].tolist():
            part = slice(first, first + slots)
            model_head = int(a["heads"][head])
            query = a["query"][row, model_head * a["rows"] :][: a["rows"], 0].cpu().double()
            line = query @ self.keys[part].mT * a["scaling"]
            if a["softcap"]:
                line = torch.tanh(line / a["softcap"]) * a["softcap"]
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
    softcap: float = 0.0,
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
    query = random(batch, 1, heads * rows, dim, seed=5).to(dtype).transpose(1, 2)
    arguments = {
        "query": query,
        "heads": (torch.arange(heads) + 1) % heads,
        "center": center,
        "key_scale": scale,
        "keys": keys,
        "values": values,
        "k_dtype": k_dtype,
        "v_dtype": v_dtype,
        "position": position,
        "work": torch.tensor(work_list(segments, chunk)),
        "start": start,
        "seen": torch.tensor(NOW + 1),
        "first_work": 1,
        "scaling": dim**-0.5,
        "softcap": softcap,
        "window": window,
        "block": block,
        "chunk": chunk,
        "rows": rows,
    }
    moved = {name: to(value, device) for name, value in arguments.items()}
    numbers = decode(values, v_dtype, value_dim)[:total].double()
    return Split(moved, segments, visible, stored, numbers)


def to(value: Any, device: str) -> Any:
    """Tensors and codes on `device`."""
    if isinstance(value, Codes):
        return Codes(
            *(None if t is None else t.to(device) for t in (value.data, value.scale, value.minimum))
        )
    return value.to(device) if isinstance(value, Tensor) else value


def run_split(kernel: Any, case: Split) -> dict[str, Tensor]:
    """What `kernel` writes, on the CPU."""
    found = case.outputs()
    arguments = {k: v for k, v in case.arguments.items() if k != "rows"}
    kernel(**arguments, **found)
    return {name: t.cpu() for name, t in found.items()}


def check_split(kernel: Any, case: Split, tolerance: float) -> None:
    """Every piece against float64; nothing is written beside the pieces."""
    found, (out, lse, logits) = run_split(kernel, case), case.expected()
    pieces = slice(1, 1 + len(out))
    total = found["total"][pieces].double()
    mine = found["accumulated"][pieces].double() / total.clamp(min=1e-30).unsqueeze(-1)
    torch.testing.assert_close(mine, out, atol=tolerance, rtol=tolerance)
    sees = lse > -torch.inf
    mine = found["maximum"][pieces].double() + total.log()
    torch.testing.assert_close(mine[sees], lse[sees], atol=tolerance, rtol=tolerance)
    assert (total[~sees] == 0).all()
    seen = case.visible.expand_as(logits)
    torch.testing.assert_close(
        found["logits"].double()[seen], logits[seen], atol=tolerance, rtol=tolerance
    )
    for name in ("accumulated", "maximum", "total"):
        assert found[name][0].isnan().all()
        assert found[name][-1].isnan().all()


def empty_codes(dtype: str, slots: int, dim: int, groups: int, model: torch.dtype) -> Codes:
    data = torch.zeros(slots, row_elements(dtype, dim), dtype=row_torch_dtype(dtype, model))
    if dtype == "model":
        return Codes(data, None, None)
    scale = torch.zeros(slots, groups, dtype=torch.float16)
    return Codes(data, scale, torch.zeros_like(scale) if has_minimum(dtype) else None)


def same_codes(ours: Codes, theirs: Codes) -> None:
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
