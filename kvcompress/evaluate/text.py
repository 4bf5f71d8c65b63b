"""Held-out text behind a prefix that the cache holds: logits, and how far they moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evaluate.session import Session, continuation_logits

_LOGIT_ROWS: Final = 64  # rows of the vocabulary widened at a time; float64 keeps a tiny KL above 0


@dataclass(frozen=True, slots=True)
class TextLosses:
    """Float64 ``[W, C]`` each, of every predicted token.

    Attributes:
        loss: negative log-likelihood in nats.
        kl: KL(reference || this) in nats; 0 for the reference itself.
        flips: 1 where the likeliest prediction is another one than the reference's.
    """

    loss: Tensor
    kl: Tensor
    flips: Tensor


def window_logits(
    session: Callable[[], Session],
    windows: Tensor,
    context_tokens: int,
    *,
    feed_tokens: int,
    batch_rows: int,
    chunk_tokens: int | None = None,
    read: Callable[[Session, range], object] = lambda session, places: None,
) -> Tensor:
    """Logits ``[W, C, vocabulary]`` on the CPU of the last C tokens of every window.

    Args:
        session: makes an empty one.
        windows: ``[W, context_tokens + C]``; the first `context_tokens` are prefilled.
        feed_tokens: tokens of the continuation that go through the cache in one forward.
        chunk_tokens: feed the prefix in parts of so many tokens; None feeds it at once.
        read: told each session that holds the prefixes of the windows at so many places.
    """
    parts: list[Tensor] = []
    for start in range(0, len(windows), batch_rows):
        rows = windows[start : start + batch_rows]
        running = session()
        logits = running.prefill(rows[:, :context_tokens].tolist(), chunk_tokens)
        read(running, range(start, start + len(rows)))
        rest = rows[:, context_tokens:].to(logits.device)
        parts.append(continuation_logits(running, logits, rest, feed_tokens).cpu())
    return torch.cat(parts)


def text_losses(logits: Tensor, reference: Tensor | None, target: Tensor) -> TextLosses:
    """Compare, in slices, so that a large vocabulary fits.

    Args:
        logits, reference: ``[W, C, vocabulary]``; None for a `reference` that is `logits` itself.
        target: ``[W, C]`` the true tokens.
    """
    true, rows = target.reshape(-1), logits.flatten(0, 1)
    other = rows if reference is None else reference.flatten(0, 1)
    found: list[Tensor] = []
    for part in torch.arange(len(true)).split(_LOGIT_ROWS):
        ours, theirs = rows[part].double().log_softmax(-1), other[part].double().log_softmax(-1)
        loss = -ours.gather(1, true[part, None])[:, 0]
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        flips = (ours.argmax(-1) != theirs.argmax(-1)).double()
        found.append(torch.stack([loss, kl, flips]))
    return TextLosses(*torch.cat(found, 1).reshape(3, *target.shape))
