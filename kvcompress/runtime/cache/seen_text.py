"""A hash of the tokens that a cache has seen, so that nobody continues it with another text."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError

UNDO_TOKENS: Final = 256
_LATE_STEPS: Final = 1024


class SeenText:
    """One hash per row, ``h ← sha256(h + id)`` for every token, however forwards cut the text.

    Padding counts, as it does for `generate`, which slices `input_ids` by column. Hashes are made
    on the host: of a prompt when it comes, of decoded tokens when somebody asks, or 1024 of them
    at a time, so that a decode step does not wait for a GPU.

    Attributes:
        tokens: columns seen.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._rows: list[bytes] | None = []
        self._late: list[Tensor] = []  # ``[B, 1]`` ids that are not in the hashes yet
        # the hashes before each of the newest tokens, which `crop` goes back to
        self._before: deque[list[bytes]] = deque(maxlen=UNDO_TOKENS)

    @property
    def rows(self) -> list[bytes] | None:
        """The hash of each row; empty before the first token, None once tokens came without ids."""
        self._hash_late()
        return self._rows

    def __getstate__(self) -> dict[str, object]:
        self._hash_late()
        return dict(vars(self))

    def update(self, ids: Tensor | None) -> None:
        """Take in the ids ``[B, T]`` of a forward; None where it had none, as with embeddings."""
        if ids is None:
            self._rows, self._late = None, []
        if ids is None or self._rows is None:
            return
        self.tokens += ids.shape[1]
        self._late.append(ids.detach().clone())
        if ids.shape[1] != 1 or len(self._late) >= _LATE_STEPS:
            self._hash_late()

    def _hash_late(self) -> None:
        late, self._late = self._late, []
        if late:
            self._hash(torch.cat(late, 1))

    def _hash(self, ids: Tensor) -> None:
        ids = ids.cpu().long()
        rows = self._rows or [b""] * ids.shape[0]
        early = max(0, ids.shape[1] - UNDO_TOKENS)
        rows = [_advance(*pair) for pair in zip(rows, ids[:, :early], strict=True)]
        for column in ids[:, early:].T:
            self._before.append(rows)
            rows = [_advance(*pair) for pair in zip(rows, column, strict=True)]
        self._rows = rows

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens.

        Raises:
            ValueError: for more than the newest 256, which is all that it can forget.
        """
        if self.rows is None:
            return
        if not 0 <= tokens <= len(self._before):
            raise ValueError(f"cannot forget {tokens} tokens, only up to {len(self._before)}")
        self.tokens -= tokens
        for _ in range(tokens):
            self._rows = self._before.pop()

    def select_rows(self, rows: list[int]) -> None:
        """Row b goes on as a copy of old row ``rows[b]``."""
        if self.rows:
            self._rows = [self.rows[row] for row in rows]
            steps = ([step[row] for row in rows] for step in self._before)
            self._before = deque(steps, maxlen=UNDO_TOKENS)

    def check(self, ids: Tensor, seen_tokens: int) -> None:
        """Refuse `ids` ``[B, T]`` that do not start with the tokens seen.

        Args:
            seen_tokens: of the cache, ids or not.

        Raises:
            KVCompressError: naming the first row that differs.
        """
        if self.rows is None or self.tokens != seen_tokens:
            raise KVCompressError(
                f"the cache has seen {seen_tokens} tokens and not the ids of all of them, as with "
                "embeddings or compiled steps, so it cannot be compared with input_ids"
            )
        if self.rows and ids.shape[0] != len(self.rows):
            raise KVCompressError(
                f"{ids.shape[0]} rows of ids, the cache holds {len(self.rows)}; pass the same batch"
            )
        if ids.shape[1] < self.tokens:
            raise KVCompressError(
                f"{ids.shape[1]} tokens of ids, the cache has seen {self.tokens}; pass the whole "
                "text, its cached beginning included"
            )
        other = SeenText()
        other.update(ids[:, : self.tokens])
        for row, (mine, theirs) in enumerate(zip(self.rows, other.rows or [], strict=False)):
            if mine != theirs:
                raise KVCompressError(
                    f"row {row}: the first {self.tokens} ids are not the tokens that the cache has "
                    "seen; use the text that it was made from, or a new cache"
                )

    def to_host(self) -> dict[str, object]:
        """The hashes as JSON can hold them; what `crop` needs is left out."""
        rows = None if self.rows is None else [row.hex() for row in self.rows]
        return {"tokens": self.tokens, "rows": rows}

    @staticmethod
    def from_host(host: dict[str, object]) -> SeenText:
        """Inverse of `to_host`."""
        digest = SeenText()
        tokens, rows = host["tokens"], host["rows"]
        if not isinstance(tokens, int) or not isinstance(rows, list | None):
            raise ValueError(f"token digest {host}")
        digest.tokens = tokens
        digest._rows = None if rows is None else [bytes.fromhex(row) for row in rows]
        return digest


def _advance(row: bytes, ids: Tensor) -> bytes:
    data = ids.contiguous().numpy().tobytes()
    for at in range(0, len(data), 8):
        row = hashlib.sha256(row + data[at : at + 8]).digest()
    return row
