"""Codes of the heads of a layer that share storage, on the device and on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcompress.evict.digest import VECTORS, digest_of
from kvcompress.plan import KVDtype, Recall
from kvcompress.quant.codec import (
    Codes,
    decode,
    encode,
    has_minimum,
    rounded,
    row_elements,
    row_torch_dtype,
    value_groups,
)
from kvcompress.runtime.recall.host import BlockLayout, HostPool
from kvcompress.runtime.store.segments import StorageKind
from kvcompress.runtime.store.state import LayerSettings

DIGEST_DTYPE: Final = "int8"
_WIDENED_TOKENS: Final = 4096  # of one row, widened to float32 at a time


class Coded(NamedTuple):
    """Keys, centred and scaled, and values of the same tokens, in codes."""

    keys: Codes
    values: Codes

    def tensors(self) -> list[Tensor]:
        found = [t for c in self for t in (c.data, c.scale, c.minimum)]
        return [t for t in found if t is not None]

    def of(self, tensors: list[Tensor]) -> Coded:
        """The same kind of codes with other tensors, in the order of `tensors()`."""
        rest = iter(tensors)
        return Coded(*(c.each(lambda held: next(rest)) for c in self))

    def at(self, *index: Tensor | slice | int) -> Coded:
        return self.of([t[index] for t in self.tensors()])

    def put(self, index: tuple[Tensor | slice | int, ...], source: Coded) -> None:
        for target, new in zip(self.tensors(), source.tensors(), strict=True):
            target[index] = new if new.dtype == target.dtype else rounded(new, target.dtype)


def joined(parts: list[Coded]) -> Coded:
    """Tokens of `parts` ``[heads, tokens, …]`` one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.tensors() for part in parts), strict=True)
    return parts[0].of([torch.cat(column, 1) for column in columns])


@dataclass(slots=True)
class RecallGroup:
    """See the module docstring.

    Attributes:
        positions: that the key constants are for.
        index: ``[Hg]`` KV head numbers.
        window: codes ``[B, Hg, allocated blocks · block tokens, …]``.
        digest: codes ``[B, Hg, vectors, E, …]`` of 8 bits, of centred and scaled keys.
        table: per row the pool's slot of each block on the host.
    """

    settings: LayerSettings
    positions: int
    recall: Recall
    index: Tensor
    kind: StorageKind
    window: Coded
    digest: Codes
    pool: HostPool
    table: list[list[int]]

    @staticmethod
    def all_empty(settings: LayerSettings, key: Tensor, value: Tensor) -> list[RecallGroup]:
        """The groups of a layer, for keys like `key` ``[B, Hkv, T, D]`` and values likewise."""
        recall = settings.plan.recall
        assert recall is not None
        batch, dim, value_dim = key.shape[0], key.shape[-1], value.shape[-1]
        positions = settings.positions_for(key.shape[2])
        members: dict[StorageKind, list[int]] = {}
        for number, head in enumerate(settings.heads):
            kind = StorageKind(head.k_dtype, head.v_dtype, scored=False)
            members.setdefault(kind, []).append(number)
        groups = []
        for kind, own in members.items():
            window = Coded(
                _no_codes(kind.k_dtype, key, len(own), 1),
                _no_codes(kind.v_dtype, value, len(own), value_groups(kind.v_dtype, value_dim)),
            )
            layout = BlockLayout.of(kind, recall.block_tokens, dim, value_dim, key.dtype)
            empty = key.new_zeros(batch, len(own), VECTORS[recall.digest], 0, dim)
            digest = encode(empty, DIGEST_DTYPE)
            pool = HostPool(layout, len(own), pinned=key.device.type == "cuda")
            index = torch.tensor(own, device=key.device)
            groups.append(
                RecallGroup(
                    *(settings, positions, recall, index, kind, window, digest, pool),
                    [[] for _ in range(batch)],
                )
            )
        return groups

    def tensors(self) -> list[Tensor]:
        """On the device; `index` is the plan's."""
        return [*self.window.tensors(), *self.digest_tensors()]

    def digest_tensors(self) -> list[Tensor]:
        assert self.digest.scale is not None and self.digest.minimum is not None
        return [self.digest.data, self.digest.scale, self.digest.minimum]

    def key_constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(centre, scale) of all heads, each ``[Hkv, D]`` float32."""
        return self.settings.key_constants(device, self.positions)

    def encode(self, key: Tensor, value: Tensor) -> Coded:
        """Codes of the group's heads ``[Hg, t, …]``, from tokens of all heads ``[Hkv, t, D]``."""
        center, scale = self.key_constants(key.device)
        center, scale = center[self.index, None], scale[self.index, None]
        groups = value_groups(self.kind.v_dtype, value.shape[-1])
        parts = []
        for low in range(0, max(1, key.shape[1]), _WIDENED_TOKENS):
            cut = slice(low, low + _WIDENED_TOKENS)
            k = (key[self.index, cut].float() - center) / scale
            k = k.to(key.dtype) if self.kind.k_dtype == "model" else k
            v = value[self.index, cut]
            parts.append(Coded(encode(k, self.kind.k_dtype), encode(v, self.kind.v_dtype, groups)))
        return joined(parts)

    def send(self, b: int, line: Coded) -> None:
        """Move tokens ``[Hg, blocks · size, …]`` of row b to the host; their digests stay."""
        size = self.recall.block_tokens
        blocks = line.of([t.unflatten(1, (-1, size)).transpose(0, 1) for t in line.tensors()])
        first, step = len(self.table[b]), max(1, _WIDENED_TOKENS // size)
        self.table[b] += self.pool.put(self.pool.layout.pack(*blocks))
        self.make_room(max(len(self.table[b]), self.digest.data.shape[3]))
        for low in range(0, len(self.table[b]) - first, step):
            keys = blocks.at(slice(low, low + step)).keys
            wide = decode(keys, self.kind.k_dtype, self.digest.data.shape[-1])
            found = digest_of(wide, self.recall.digest).permute(1, 2, 0, 3)  # [Hg, vectors, n, D]
            here = slice(first + low, first + low + found.shape[2])
            new = encode(found, DIGEST_DTYPE)
            for target, source in zip(
                self.digest_tensors(), (new.data, new.scale, new.minimum), strict=True
            ):
                assert source is not None
                target[b, :, :, here] = source

    def bring_back(self, b: int, first: int) -> Coded:
        """Take the blocks of row b from `first` on back to the device, ``[Hg, tokens, …]``."""
        slots, self.table[b] = self.table[b][first:], self.table[b][:first]
        heads = self.pool.heads
        wanted = torch.tensor(slots).repeat_interleave(heads)
        every = torch.arange(heads).repeat(len(slots))
        packed = self.pool.get(wanted, every, self.index.device).unflatten(0, (-1, heads))
        self.pool.release(slots)
        found = Coded(*self.pool.layout.unpack(packed.transpose(0, 1)))
        return found.of([t.flatten(1, 2) for t in found.tensors()])

    def make_room(self, blocks: int) -> None:
        """Digests of exactly so many blocks per row."""
        if self.digest.data.shape[3] == blocks:
            return
        fitted = []
        for old in self.digest_tensors():
            new = old.new_zeros(*old.shape[:3], blocks, old.shape[4])
            both = min(blocks, old.shape[3])
            new[:, :, :, :both] = old[:, :, :, :both]
            fitted.append(new)
        self.digest = Codes(*fitted)

    def select_rows(self, index: Tensor, slots: int, digests: int) -> None:
        """Rows `index` ``[B]``, with so many window slots and digests each."""
        tensors = [t[index, :, :slots].contiguous() for t in self.window.tensors()]
        self.window = self.window.of(tensors)
        self.digest = Codes(*(t[index] for t in self.digest_tensors()))
        self.make_room(digests)
        before, self.table = self.table, [list(self.table[row]) for row in index.tolist()]
        for line in self.table:
            self.pool.share(line)
        for line in before:
            self.pool.release(line)
        if 2 * self.pool.used < self.pool.data.shape[0]:
            moved = self.pool.compact()
            self.table = [[moved[slot] for slot in line] for line in self.table]

    def copy(self) -> RecallGroup:
        """A group that goes its own way; the host's blocks are shared."""
        for line in self.table:
            self.pool.share(line)
        return RecallGroup(
            *(self.settings, self.positions, self.recall, self.index, self.kind),
            self.window.of([t.clone() for t in self.window.tensors()]),
            Codes(*(t.clone() for t in self.digest_tensors())),
            self.pool,
            [list(line) for line in self.table],
        )


def _no_codes(dtype: KVDtype, like: Tensor, heads: int, groups: int) -> Codes:
    """Codes ``[B, heads, 0, …]`` of vectors like those of `like` ``[B, Hkv, T, D]``."""
    element, batch = row_torch_dtype(dtype, like.dtype), like.shape[0]
    data = like.new_zeros(batch, heads, 0, row_elements(dtype, like.shape[-1]), dtype=element)
    if dtype == "model":
        return Codes(data, None, None)
    meta = like.new_zeros(batch, heads, 0, groups, dtype=torch.float16)
    return Codes(data, meta, meta.clone() if has_minimum(dtype) else None)
