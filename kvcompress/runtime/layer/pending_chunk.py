"""A prompt that is kept uncompressed until it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.runtime.store.attend import Chunk


@dataclass(slots=True)
class PendingChunk:
    """A chunk that was attended but not stored yet: later layers read it, or the prompt goes on.

    Attributes:
        scores: per scored group ``[B, Hg, P + T]``, the votes for its keys so far.
    """

    chunk: Chunk
    scores: dict[int, Tensor]

    @property
    def tokens(self) -> int:
        return self.chunk.key.shape[2]

    def followed_by(self, chunk: Chunk) -> Chunk:
        """`chunk` with these tokens held before its own."""
        held = self.chunk
        return replace(
            chunk,
            key=torch.cat([held.key, chunk.key], 2),
            value=torch.cat([held.value, chunk.value], 2),
            valid=_joined(held, chunk, held.valid, chunk.valid, True),
            flags=_joined(held, chunk, held.flags, chunk.flags, 0),
        )

    def scores_before(self, own: dict[int, Tensor]) -> dict[int, Tensor]:
        """The scores of the held tokens, then `own` of a chunk that follows."""
        return {number: torch.cat([self.scores[number], s], 2) for number, s in own.items()}

    def without_queries_but(self, query: Tensor) -> PendingChunk:
        """Only the newest queries ``[B, Hq, n, D]`` stay, for votes at the prompt's end."""
        chunk = self.chunk
        stop = chunk.first + chunk.key.shape[2]
        chunk = replace(chunk, query=query, position=stop - query.shape[2], mask=None)
        return PendingChunk(chunk, self.scores)

    def without_last(self, count: int) -> PendingChunk:
        """The newest `count` tokens gone."""
        chunk = self.chunk
        stop = chunk.key.shape[2] - count
        kept = replace(
            chunk,
            query=chunk.query[:, :, :0],
            key=chunk.key[:, :, :stop],
            value=chunk.value[:, :, :stop],
            position=chunk.first + stop,
            valid=None if chunk.valid is None else chunk.valid[:, :stop],
            flags=None if chunk.flags is None else chunk.flags[:, :stop],
        )
        return PendingChunk(kept, {number: s[:, :, :stop] for number, s in self.scores.items()})

    def tensors(self) -> list[Tensor]:
        chunk = self.chunk
        held = [chunk.query, chunk.key, chunk.value, chunk.valid, chunk.flags]
        return [t for t in held if t is not None] + list(self.scores.values())

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors())


def _joined(
    held: Chunk, chunk: Chunk, before: Tensor | None, own: Tensor | None, default: int
) -> Tensor | None:
    """``[B, P + T]`` of what pending and new tokens have each; `default` where one has nothing."""
    if before is None and own is None:
        return None
    known = own if own is not None else before
    assert known is not None
    batch = chunk.key.shape[0]
    if before is None:
        before = known.new_full((batch, held.key.shape[2]), default)
    if own is None:
        own = known.new_full((batch, chunk.key.shape[2]), default)
    return torch.cat([before, own], 1)
