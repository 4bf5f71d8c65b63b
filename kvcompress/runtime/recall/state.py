"""What a layer with a recall tier holds, and where each token lies.

Tokens of a row are numbered from its first real one; behind the sinks, token number i is
  exact     among the newest `recent_tokens`, in slot i mod recent_tokens;
  coded     before them, in slot i mod (window blocks · block tokens) of the window,
  host      in block i div block tokens, once the window is full: its oldest block goes as a whole.
Where a token lies follows from its number, the row's length and the length of its prompt alone, so
tokens that come one by one, in chunks or again after a draft was taken back lie in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.accounting import RecallBlocks, recall_blocks
from kvcompress.plan import Recall
from kvcompress.runtime.recall.group import RecallGroup, joined
from kvcompress.runtime.store.state import LayerSettings


@dataclass(slots=True)
class RecallState:
    """See the module docstring.

    Attributes:
        exact_k, exact_v: ``[B, Hkv, sinks + recent, D]`` model dtype; the first `row_seen` of a
            row are in use, sinks first.
        row_seen: real tokens of each row so far.
        budget_length: `row_seen` when the last prompt ended; a ratio resolves against it.
        blocks: of each row.
    """

    settings: LayerSettings
    recall: Recall
    exact_k: Tensor
    exact_v: Tensor
    groups: list[RecallGroup]
    row_seen: list[int]
    budget_length: list[int]
    blocks: RecallBlocks = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = self._blocks_for(self.row_seen)

    @staticmethod
    def empty(settings: LayerSettings, key: Tensor, value: Tensor) -> RecallState:
        """For keys like `key` ``[B, Hkv, T, D]`` and values ``[B, Hkv, T, Dv]``."""
        recall = settings.plan.recall
        assert recall is not None
        batch, heads = key.shape[:2]
        return RecallState(
            settings,
            recall,
            key.new_zeros(batch, heads, settings.exact_tokens, key.shape[-1]),
            key.new_zeros(batch, heads, settings.exact_tokens, value.shape[-1]),
            RecallGroup.all_empty(settings, key, value),
            [0] * batch,
            [0] * batch,
        )

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    def coded(self) -> list[int]:
        """Coded tokens of each row, on the device and on the host."""
        return [max(0, seen - self.settings.exact_tokens) for seen in self.row_seen]

    def _blocks_for(self, seen: list[int]) -> RecallBlocks:
        return recall_blocks(self.recall, self.settings.exact_tokens, seen, self.budget_length)

    def tensors(self) -> list[Tensor]:
        """Every tensor on the device that grows with the batch or the context."""
        return [self.exact_k, self.exact_v, *(t for g in self.groups for t in g.tensors())]

    def nbytes(self) -> int:
        """Bytes of the resident part."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def host_nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(group.pool.data.nbytes for group in self.groups)

    # ---- taking tokens in
    def take_in(self, key: Tensor, value: Tensor, valid: Tensor | None, prompt: bool) -> None:
        """Store tokens ``[B, Hkv, T, D]``; `valid` ``[B, T]`` is False for padding.

        Args:
            prompt: they end a prompt, or a part of one, so ratios resolve anew.
        """
        length, exact = key.shape[2], self.settings.exact_tokens
        if not prompt and length == 1 and valid is None and min(self.row_seen) >= exact:
            self._take_in_one(key, value)
            return
        counts = [length] * self.batch if valid is None else valid.sum(1).tolist()
        seen = [old + count for old, count in zip(self.row_seen, counts, strict=True)]
        before = self.blocks
        if prompt:
            self.budget_length = list(seen)
        leaving = []
        for b in range(self.batch):
            k, v = key[b], value[b]
            if valid is not None:
                k, v = k[:, valid[b]], v[:, valid[b]]
            leaving.append(self._pass_exact(b, k, v))
        after = self._blocks_for(seen)
        for group in self.groups:
            self._lay_out(group, leaving, seen, before, after)
        self.row_seen, self.blocks = seen, after

    def _pass_exact(self, b: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Row b's tokens ``[Hkv, t, D]`` enter the exact slots; those that leave them come out."""
        sinks, recent = self.settings.sink_tokens, self.settings.recent_tokens
        before, count = self.row_seen[b], key.shape[1]
        opening = min(max(0, sinks - before), count)
        here = slice(before, before + opening)
        self.exact_k[b, :, here], self.exact_v[b, :, here] = key[:, :opening], value[:, :opening]
        key, value = key[:, opening:], value[:, opening:]
        low, stop = max(0, before - sinks), max(0, before + count - sinks)
        first = max(0, low - recent)  # number of the oldest recent token
        if low > first:
            slots = sinks + torch.arange(first, low, device=key.device) % recent
            key = torch.cat([self.exact_k[b][:, slots], key], 1)
            value = torch.cat([self.exact_v[b][:, slots], value], 1)
        kept = max(first, stop - recent)
        slots = sinks + torch.arange(kept, stop, device=key.device) % recent
        self.exact_k[b, :, slots] = key[:, kept - first :]
        self.exact_v[b, :, slots] = value[:, kept - first :]
        return key[:, : kept - first], value[:, : kept - first]

    def _lay_out(
        self,
        group: RecallGroup,
        leaving: list[tuple[Tensor, Tensor]],
        seen: list[int],
        before: RecallBlocks,
        after: RecallBlocks,
    ) -> None:
        """A window for `after`; blocks move to the host, or back where the window has grown.

        Args:
            leaving: per row the tokens that leave the exact slots, all heads.
            seen: real tokens of each row, those of `leaving` and of the exact slots included.
        """
        size, device = self.recall.block_tokens, self.exact_k.device
        coded, lines = self.coded(), []
        for b, tokens in enumerate(leaving):
            old, new = before.host[b], after.host[b]
            slots = torch.arange(old * size, coded[b], device=device) % (before.window[b] * size)
            parts = [group.window.at(b, slice(None), slots), group.encode(*tokens)]
            if new < old:
                parts.insert(0, group.bring_back(b, new))
            line = joined(parts)
            gone = max(0, new - old) * size
            if gone:
                group.send(b, line.at(slice(None), slice(0, gone)))
            lines.append(line.at(slice(None), slice(gone, None)))
        group.make_room(after.digests)
        length = after.allocated * size
        group.window = group.window.of(
            [t.new_zeros(*t.shape[:2], length, *t.shape[3:]) for t in group.window.tensors()]
        )
        for b, line in enumerate(lines):
            stop = max(0, seen[b] - self.settings.exact_tokens)
            slots = torch.arange(after.host[b] * size, stop, device=device)
            group.window.put((b, slice(None), slots % (after.window[b] * size)), line)

    def _take_in_one(self, key: Tensor, value: Tensor) -> None:
        """One decoded token for every row, each of which has filled its exact slots."""
        sinks, recent = self.settings.sink_tokens, self.settings.recent_tokens
        size, device = self.recall.block_tokens, key.device
        seen = [n + 1 for n in self.row_seen]
        after = self._blocks_for(seen)
        row = torch.arange(self.batch, device=device)
        slot = torch.tensor([sinks + (n - sinks) % recent for n in self.row_seen], device=device)
        place = [n % (w * size) for n, w in zip(self.coded(), after.window, strict=True)]
        where = torch.tensor(place, device=device)
        leaving = (self.exact_k[row, :, slot], self.exact_v[row, :, slot])  # [B, Hkv, D]
        for group in self.groups:
            for b, host in enumerate(after.host):
                if host > len(group.table[b]):  # its first slot is the one to be written
                    block = slice(place[b], place[b] + size)
                    group.send(b, group.window.at(b, slice(None), block))
            group.make_room(after.digests)
            missing = after.allocated * size - group.window.keys.data.shape[2]
            if missing:
                tensors = group.window.tensors()
                group.window = group.window.of([_longer(t, missing) for t in tensors])
            coded = group.encode(*(t.transpose(0, 1) for t in leaving))
            coded = coded.of([t.transpose(0, 1) for t in coded.tensors()])
            group.window.put((row, slice(None), where), coded)
        self.exact_k[row, :, slot], self.exact_v[row, :, slot] = key[:, :, 0], value[:, :, 0]
        self.row_seen, self.blocks = seen, after

    # ---- rows and copies
    def select_rows(self, rows: list[int]) -> None:
        """Row b becomes a copy of old row ``rows[b]``; the host's blocks are shared, not copied."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.exact_k.device)
        self.exact_k, self.exact_v = self.exact_k[index], self.exact_v[index]
        self.row_seen = [self.row_seen[row] for row in rows]
        self.budget_length = [self.budget_length[row] for row in rows]
        self.blocks = self._blocks_for(self.row_seen)
        length = self.blocks.allocated * self.recall.block_tokens
        for group in self.groups:
            group.select_rows(index, length, self.blocks.digests)

    def copy(self) -> RecallState:
        """A state that goes its own way; the host's blocks are shared."""
        return RecallState(
            *(self.settings, self.recall, self.exact_k.clone(), self.exact_v.clone()),
            [group.copy() for group in self.groups],
            list(self.row_seen),
            list(self.budget_length),
        )

    def release(self) -> None:
        """Name none of the host's blocks any more; the state is of no use after."""
        for group in self.groups:
            for line in group.table:
                group.pool.release(line)


def _longer(tensor: Tensor, tokens: int) -> Tensor:
    """``[B, Hg, C + tokens, …]``, zero where new."""
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:2], tokens, *tensor.shape[3:])], 2)
