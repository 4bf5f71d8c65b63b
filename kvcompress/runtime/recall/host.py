"""Blocks of codes in host memory, one row of bytes per (block, KV head), shared between rows.

A block never changes once it lies here, so rows that are copies of each other, as beams are, name
the same blocks; a block is given free when the last row that names it is gone. All of a block that
one KV head needs, keys, values, scales and minima, lies together: one copy brings it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.accounting import host_slots
from kvcompress.quant.codec import Codes, has_minimum, row_elements, row_torch_dtype, value_groups
from kvcompress.runtime.store.segments import StorageKind


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How the codes of one block and KV head lie in bytes.

    Attributes:
        parts: (torch dtype, elements per token) of key data, value data, and then of the scale and
            the minimum of keys and of values, None where the codec has none.
    """

    block_tokens: int
    parts: tuple[tuple[torch.dtype, int] | None, ...]

    @staticmethod
    def of(
        kind: StorageKind,
        block_tokens: int,
        head_dim: int,
        value_dim: int,
        model_dtype: torch.dtype,
    ) -> BlockLayout:
        data: list[tuple[torch.dtype, int] | None] = []
        meta: list[tuple[torch.dtype, int] | None] = []
        for dtype, dim, groups in (
            (kind.k_dtype, head_dim, 1),
            (kind.v_dtype, value_dim, value_groups(kind.v_dtype, value_dim)),
        ):
            data.append((row_torch_dtype(dtype, model_dtype), row_elements(dtype, dim)))
            meta.append(None if dtype == "model" else (torch.float16, groups))
            meta.append((torch.float16, groups) if has_minimum(dtype) else None)
        return BlockLayout(block_tokens, (*data, *meta))

    @property
    def nbytes(self) -> int:
        return sum(self._bytes(part) for part in self.parts if part is not None)

    def _bytes(self, part: tuple[torch.dtype, int]) -> int:
        return self.block_tokens * part[0].itemsize * part[1]

    def pack(self, keys: Codes, values: Codes) -> Tensor:
        """``[..., nbytes]`` uint8 of codes ``[..., block_tokens, row]``."""
        tensors = (keys.data, values.data, keys.scale, keys.minimum, values.scale, values.minimum)
        held = [t.contiguous().flatten(-2).view(torch.uint8) for t in tensors if t is not None]
        return torch.cat(held, -1)

    def unpack(self, packed: Tensor) -> tuple[Codes, Codes]:
        """Inverse of `pack`; views of `packed`."""
        found: list[Tensor | None] = []
        start = 0
        for part in self.parts:
            if part is None:
                found.append(None)
                continue
            stop = start + self._bytes(part)
            cut = packed[..., start:stop].view(part[0])
            found.append(cut.unflatten(-1, (self.block_tokens, part[1])))
            start = stop
        k, v, k_scale, k_minimum, v_scale, v_minimum = found
        assert k is not None and v is not None
        return Codes(k, k_scale, k_minimum), Codes(v, v_scale, v_minimum)


class HostPool:
    """Blocks of the heads of one group.

    Args:
        pinned: page-locked memory, from which a GPU copies without a second copy on the host.

    Attributes:
        data: ``[slots, heads, nbytes]`` uint8 on the CPU.
        copied_bytes: brought back so far.
    """

    def __init__(self, layout: BlockLayout, heads: int, pinned: bool) -> None:
        self.layout, self.heads, self.pinned = layout, heads, pinned
        self.data = self._empty(0)
        self.copied_bytes = 0
        self._names: list[int] = []  # how many rows name each slot

    def _empty(self, slots: int) -> Tensor:
        shape = (slots, self.heads, self.layout.nbytes)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pinned and slots > 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostPool:
        copied = HostPool(self.layout, self.heads, self.pinned)
        copied.data = copied._empty(self.data.shape[0]).copy_(self.data)
        copied.copied_bytes, copied._names = self.copied_bytes, deepcopy(self._names)
        return copied

    @property
    def used(self) -> int:
        """Blocks that some row names."""
        return len(self._names) - self._names.count(0)

    def put(self, packed: Tensor) -> list[int]:
        """Slots in which blocks ``[N, heads, nbytes]`` now lie, each named once."""
        count = packed.shape[0]
        free = [slot for slot, names in enumerate(self._names) if not names][:count]
        total = len(self._names) + count - len(free)
        if total > self.data.shape[0]:
            grown = self._empty(host_slots(total))
            grown[: self.data.shape[0]] = self.data
            self.data = grown
        slots = free + list(range(len(self._names), total))
        self._names += [0] * (total - len(self._names))
        self.share(slots)
        if slots == list(range(slots[0], slots[0] + count)):
            self.data[slots[0] : slots[0] + count] = packed
        else:
            self.data[torch.tensor(slots)] = packed.cpu()
        return slots

    def share(self, slots: Iterable[int]) -> None:
        """One more row names each of these slots."""
        for slot in slots:
            self._names[slot] += 1

    def release(self, slots: Iterable[int]) -> None:
        """One row fewer names each of these slots."""
        for slot in slots:
            self._names[slot] -= 1

    def get(self, slots: Tensor, heads: Tensor, device: torch.device) -> Tensor:
        """Bytes ``[N, nbytes]`` on `device` of (slot, head) pairs, both ``[N]`` on the CPU."""
        flat = self.data.flatten(0, 1)
        out = torch.empty(len(slots), self.layout.nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        torch.index_select(flat, 0, slots * self.heads + heads, out=out)
        self.copied_bytes += out.nbytes
        return out.to(device, non_blocking=self.pinned)

    def compact(self) -> dict[int, int]:
        """Give free what no row names; gives the new slot of every old one that stays."""
        kept = [slot for slot, names in enumerate(self._names) if names]
        smaller = self._empty(host_slots(len(kept)))
        smaller[: len(kept)] = self.data[torch.tensor(kept, dtype=torch.int64)]
        self.data = smaller
        self._names = [self._names[slot] for slot in kept]
        return {slot: new for new, slot in enumerate(kept)}
