"""Exact attention over what is on the device, the blocks that come back for it, and the chunk.

Every query row ranks the blocks of its row by their digests and sees its own best blocks alone, so
what a token sees does not depend on which other tokens come with it; a few rows at a time share one
copy of all that they chose. Keys keep the positions that they had.

Differs from InfLLM (arXiv 2402.04617): there all recalled tokens get one position, one set of
blocks serves all heads of a layer, and a chunk of 512 queries chooses together.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.digest import best_blocks, query_parts
from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import decode_split, key_logits
from kvcompress.quant.codec import Codes
from kvcompress.runtime.recall.group import DIGEST_DTYPE, Coded, RecallGroup
from kvcompress.runtime.recall.state import RecallState
from kvcompress.runtime.store.attend import QUERY_BLOCK, Chunk

RECALL_ROWS: Final = 16  # query rows that share one copy of the blocks that they chose


def attend(state: RecallState, chunk: Chunk) -> Tensor:
    """Attention ``[B, Hq, T, D]`` of the chunk, in the query's dtype."""
    batch, q_heads, length, _ = chunk.query.shape
    heads = chunk.key.shape[1]
    out = chunk.query.new_empty(batch, q_heads, length, chunk.value.shape[-1])
    step = RECALL_ROWS if any(state.blocks.host) else QUERY_BLOCK
    for low in range(0, length, step):
        rows = slice(low, min(length, low + step))
        part = _Rows(state, chunk, rows).output()
        out[:, :, rows] = part.reshape(batch, heads, -1, rows.stop - low, part.shape[-1]).flatten(
            1, 2
        )
    return out


class _Rows:
    """A few query rows of a chunk; those of a KV head's query heads lie one after the other."""

    def __init__(self, state: RecallState, chunk: Chunk, rows: slice) -> None:
        self.state, self.chunk, self.rows = state, chunk, rows
        self.batch, self.heads = chunk.query.shape[0], chunk.key.shape[1]
        self.n = rows.stop - rows.start
        query = chunk.query[:, :, rows].float() * chunk.scaling
        self.query = query.reshape(self.batch, self.heads, -1, query.shape[-1])
        self.device = query.device
        self.combiner = Combiner(
            self.batch, self.heads, self.query.shape[2], chunk.value.shape[-1], self.device
        )

    def output(self) -> Tensor:
        """``[B, Hkv, G·n, D]`` float32."""
        every = torch.arange(self.heads, device=self.device)
        if any(self.state.row_seen):
            seen = torch.tensor(self.state.row_seen, device=self.device)[:, None]
            slot = torch.arange(self.state.exact_k.shape[2], device=self.device)
            exact = Coded(*(Codes(t, None, None) for t in (self.state.exact_k, self.state.exact_v)))
            self._add(self.query, None, exact, (slot < seen)[:, None, None], every)
            for group in self.state.groups:
                self._add_group(group)
        chunk, stop = self.chunk, self.chunk.held + self.rows.stop
        own = Coded(*(Codes(t[:, :, :stop], None, None) for t in (chunk.key, chunk.value)))
        self._add(self.query, None, own, self._own_visible(stop)[:, None], every)
        if chunk.sinks is not None:
            logits = chunk.sinks.view(self.heads, -1, 1).expand(-1, -1, self.n)
            self.combiner.add_logits(logits.reshape(self.heads, -1))
        return self.combiner.output()

    def _add(
        self,
        query: Tensor,
        offset: Tensor | None,
        held: Coded,
        visible: Tensor,
        heads: Tensor,
        kind: tuple[str, str] = ("model", "model"),
    ) -> None:
        """One part of the softmax.

        Args:
            query: ``[B, Hg, G·n, D]``; `offset` without D.
            held: ``[B, Hg, C, …]``.
            visible: ``[B or 1, Hg or 1, n or 1, C]``.
            heads: ``[Hg]`` KV head numbers.
        """
        slots = held.keys.data.shape[2]
        if not slots:
            return
        shown = visible.expand(self.batch, len(heads), *visible.shape[2:])
        shown = shown.repeat(1, 1, self.query.shape[2] // self.n if visible.shape[2] > 1 else 1, 1)
        flat = held.of([t.flatten(0, 1) for t in held.tensors()])
        part = decode_split(
            query.flatten(0, 1),
            None if offset is None else offset.flatten(0, 1),
            flat.keys,
            flat.values,
            *kind,  # type: ignore[arg-type]
            shown.flatten(0, 1),
            self.chunk.softcap,
        )
        where = torch.arange(self.batch, device=self.device).repeat_interleave(len(heads))
        self.combiner.add(part, where, heads.repeat(self.batch))

    def _add_group(self, group: RecallGroup) -> None:
        """The window, and the blocks that come back."""
        center, scale = group.key_constants(self.device)
        plain = self.query[:, group.index]
        query = plain * scale[group.index, None]
        offset = (plain * center[group.index, None]).sum(-1)
        kind = (group.kind.k_dtype, group.kind.v_dtype)
        window = self._window_visible(group.window.keys.data.shape[2])[:, None, None]
        self._add(query, offset, group.window, window, group.index, kind)
        if any(self.state.blocks.host):
            chosen = self._choose(group, query)
            held, visible = self._bring(group, chosen)
            self._add(query, offset, held, visible, group.index, kind)

    def _window_visible(self, slots: int) -> Tensor:
        """``[B, slots]``: those that hold a coded token which is not on the host."""
        state, size = self.state, self.state.recall.block_tokens
        coded, host, window = (
            torch.tensor(numbers, device=self.device)[:, None]
            for numbers in (state.coded(), state.blocks.host, state.blocks.window)
        )
        slot = torch.arange(slots, device=self.device)
        newest = coded - 1 - (coded - 1 - slot) % (window * size)  # the last token written there
        return (newest >= host * size) & (slot < window * size)

    def _choose(self, group: RecallGroup, query: Tensor) -> Tensor:
        """``[B, Hg, n, E]``: the blocks that each query row recalls."""
        recall = self.state.recall
        host = torch.tensor(self.state.blocks.host, device=self.device)
        most = max(self.state.blocks.host)
        total = query.new_zeros(self.batch * len(group.index), query.shape[2], most)
        for vector, part in enumerate(query_parts(query.flatten(0, 1), recall.digest)):
            digest = (t[:, :, vector, :most].flatten(0, 1) for t in group.digest_tensors())
            total += key_logits(part, None, Codes(*digest), DIGEST_DTYPE)
        score = total.unflatten(0, (self.batch, -1)).unflatten(2, (-1, self.n))
        chosen = best_blocks(score, host, recall.recall_blocks)
        if self.chunk.valid is not None:
            queries = self.chunk.valid[:, self.chunk.held :][:, self.rows]
            chosen &= queries[:, None, :, None]
        return chosen

    def _bring(self, group: RecallGroup, chosen: Tensor) -> tuple[Coded, Tensor]:
        """Codes ``[B, Hg, U·size, …]`` of all chosen blocks, and which rows see them."""
        state, size = self.state, self.state.recall.block_tokens
        needed = chosen.any(2)
        most = int(needed.sum(-1).max())
        block = needed.int().topk(most, -1).indices  # [B, Hg, U]; rows that need fewer get others
        table = torch.zeros(self.batch, max(state.blocks.host), dtype=torch.int64)
        for b, line in enumerate(group.table):
            table[b, : len(line)] = torch.tensor(line, dtype=torch.int64)
        row = torch.arange(self.batch)[:, None, None]
        slots = table[row, block.cpu()]
        head = torch.arange(group.pool.heads)[:, None].expand_as(slots)
        packed = group.pool.get(slots.flatten(), head.flatten(), self.device)
        found = Coded(*group.pool.layout.unpack(packed.unflatten(0, slots.shape)))
        visible = chosen.gather(-1, block[:, :, None].expand(-1, -1, self.n, -1))
        held = found.of([t.flatten(2, 3) for t in found.tensors()])
        return held, visible.repeat_interleave(size, -1)

    def _own_visible(self, stop: int) -> Tensor:
        """``[B or 1, n, stop]``: which keys held or of the chunk the rows may see."""
        chunk = self.chunk
        key = torch.arange(stop, device=self.device)
        visible = (key <= key[chunk.held + self.rows.start :, None])[None]
        if chunk.valid is not None:
            visible = visible & chunk.valid[:, None, :stop]
        if chunk.mask is not None:
            own = chunk.mask[:, 0, self.rows, : self.rows.stop]
            before = torch.ones_like(own[:, :, :1]).expand(-1, -1, chunk.held)
            visible = visible & torch.cat([before, own], -1)
        return visible
