"""Rows that share one cache: a left-padded prefill, then equally many tokens for every row."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from kvcompress.runtime.names import as_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Turn = tuple[Sequence[int], Sequence[int]]


@final
class Session:
    """See the module docstring. `model` must already serve the kind of `cache` that is given."""

    def __init__(self, model: PreTrainedModel, cache: Cache, pad_id: int) -> None:
        self.model = model
        self.cache = cache
        self.pad_id = pad_id
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.lengths = torch.zeros(0, dtype=torch.long)

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]], chunk_tokens: int | None = None) -> Tensor:
        """Logits ``[B, vocabulary]`` behind the last token of each row.

        Args:
            chunk_tokens: feed the prompt in parts of at most so many tokens; None feeds it at once.
        """
        device = self.model.device
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        ids = [[self.pad_id] * pad + list(row) for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        whole = torch.tensor(mask, device=device)
        self.lengths = whole.sum(-1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
        tokens = torch.tensor(ids, device=device)
        if chunk_tokens is not None:
            self._tell("begin_prefill")
        for low in range(0, longest, chunk_tokens or longest):
            part = slice(low, low + (chunk_tokens or longest))
            self.mask = whole[:, : part.stop]
            logits = self._forward(tokens[:, part], positions[:, part], keep=1)
        self._tell("finish_prompt", self.model)
        if chunk_tokens is not None:
            self._tell("end_prefill")
        return logits[:, -1]

    @torch.inference_mode()
    def feed(self, tokens: Tensor, keep: int = 0) -> Tensor:
        """Logits ``[B, T, vocabulary]`` behind each of the further `tokens` ``[B, T]``.

        Args:
            keep: only behind so many of the last of them; 0: behind all.
        """
        count = tokens.shape[1]
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = self.lengths[:, None] + torch.arange(count, device=tokens.device)
        self.lengths = self.lengths + count
        return self._forward(tokens, positions, keep=keep)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Go on with row ``rows[i]`` as row i; a row may be taken several times."""
        index = torch.tensor(list(rows), device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.lengths = self.mask[index], self.lengths[index]

    def twin(self) -> Session:
        """One that goes on from here and leaves this one as it is, where a cache that grows
        replaces its tensors and never writes into them; both share what they hold so far."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        twin = Session(self.model, cache, self.pad_id)
        twin.mask, twin.lengths = self.mask, self.lengths
        return twin

    def _tell(self, what: str, *values: Any) -> None:
        """Call a method of our own caches, which transformers' lack."""
        method = getattr(self.cache, what, None)
        if method is not None:
            method(*values)

    def _forward(self, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        padded = not bool(self.mask.all())
        return self.model(
            input_ids=ids,
            attention_mask=self.mask if padded else None,
            position_ids=positions,
            **as_argument(self.cache),
            use_cache=True,
            logits_to_keep=keep,
        ).logits


@dataclass(slots=True)
class Dialogue:
    """What one row is asked: tokens that are forced on it, then an answer of its own, and again.

    Attributes:
        turns: (forced tokens, most tokens to answer with) pairs; the forced tokens may be empty.
        answers: filled by `converse`, one list of tokens per turn.
    """

    turns: Sequence[tuple[Sequence[int], int]]
    answers: list[list[int]] = field(default_factory=list)
    _forced: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._begin()

    @property
    def done(self) -> bool:
        return len(self.answers) > len(self.turns)

    def _begin(self) -> None:
        self.answers.append([])
        if not self.done:
            self._forced.extend(self.turns[len(self.answers) - 1][0])

    def next_token(self, likeliest: int, ends: Callable[[int], bool], filling: int) -> int:
        """The token to feed, given the model's `likeliest` one; `filling` once all is answered."""
        if self.done:
            return filling
        if self._forced:
            return self._forced.popleft()
        answer, limit = self.answers[-1], self.turns[len(self.answers) - 1][1]
        answer.append(likeliest)
        if ends(likeliest) or len(answer) >= limit:
            self._begin()
        return likeliest


def converse(
    session: Session, logits: Tensor, dialogues: Sequence[Dialogue], ends: Callable[[int], bool]
) -> None:
    """Greedy answers of all rows at once, token by token; fills `Dialogue.answers`.

    Args:
        session: rows that have answered are dropped from it on the way, so it is of no use after.
        logits: ``[B, vocabulary]`` behind what each row holds now.
        ends: whether a token ends an answer.
    """
    running = list(dialogues)
    while True:
        likeliest = logits.argmax(-1).tolist()
        tokens = [
            dialogue.next_token(token, ends, session.pad_id)
            for dialogue, token in zip(running, likeliest, strict=True)
        ]
        going = [row for row, dialogue in enumerate(running) if not dialogue.done]
        if not going:
            break
        if 2 * len(going) <= len(running):
            session.select(going)
            running = [running[row] for row in going]
            tokens = [tokens[row] for row in going]
        fed = torch.tensor(tokens, device=logits.device)[:, None]
        logits = session.feed(fed)[:, -1]
    for dialogue in dialogues:
        del dialogue.answers[len(dialogue.turns) :]


def continuation_logits(
    session: Session, logits: Tensor, tokens: Tensor, feed_tokens: int
) -> Tensor:
    """Logits ``[B, C, vocabulary]`` that predict `tokens` ``[B, C]``, fed in small pieces."""
    parts = [logits[:, None]]
    for piece in tokens[:, :-1].split(feed_tokens, dim=1):
        parts.append(session.feed(piece))
    return torch.cat(parts, dim=1)


def answer_logits(session: Session, logits: Tensor, rows: Sequence[Sequence[Turn]]) -> list[Tensor]:
    """Questions with their true answers, all rows fed at once; what is padded comes behind them.

    Args:
        session: of no use after, as it holds what was fed.
        logits: ``[B, vocabulary]`` behind what each row holds now.
        rows: per row its turns, (forced tokens, tokens of the true answer) each.

    Returns:
        Per row ``[N, vocabulary]`` on the CPU, where each of its answers' N tokens is due.
    """
    fed, due = [], []
    for turns in rows:
        tokens, places = fed_tokens(turns)
        fed.append(tokens)
        due.append(places)
    longest = max(map(len, fed))
    padded = torch.tensor([row + [session.pad_id] * (longest - len(row)) for row in fed])
    skipped = max(0, min(min(places) for places in due) - 1)  # before it no row has an answer
    behind = session.feed(padded.to(logits.device), keep=longest - skipped)
    found = []
    for row, places in enumerate(due):
        scores = [logits[row] if p == 0 else behind[row, p - 1 - skipped] for p in places]
        found.append(torch.stack(scores).cpu())
    return found


def fed_tokens(turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """All tokens of `turns` in a row, and the places of the answers' tokens among them."""
    tokens: list[int] = []
    places: list[int] = []
    for forced, answer in turns:
        tokens += forced
        places += range(len(tokens), len(tokens) + len(answer))
        tokens += answer
    return tokens, places
