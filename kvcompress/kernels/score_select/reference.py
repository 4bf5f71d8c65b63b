"""Votes of one decoded token on stored tokens, and each piece's weakest token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.keepset import HeadRules, priority
from kvcompress.evict.scorers import Scorer, scorer
from kvcompress.kernels.decode_split.flat import sees


def rules_of(bits: Tensor) -> HeadRules:
    """`HeadRules` from the bits of `row_advance.rule_bits`."""
    return HeadRules(bits & 3, (bits & 4) != 0, (bits & 8) != 0)


def scorer_of(mean: bool) -> Scorer:
    return scorer("mean" if mean else "raw")


def vote_weight(now: Tensor, start: Tensor, valid: Tensor | None, vote: str, rows: int) -> Tensor:
    """``[B]`` weight of each query's attention: nothing, ``one``, or ``index`` + 1 as in lift."""
    weight = torch.zeros_like(start, dtype=torch.float32)
    if vote != "none":
        weight += 1.0 if vote == "one" else (now - start).float() + 1.0
    return (weight if valid is None else weight * valid) / rows


def pinned_in(spans: Tensor | None, number: Tensor) -> Tensor:
    """Whether the `number`-th real token of a row lies in one of its ``[S, 2]`` spans."""
    if spans is None:
        return torch.zeros_like(number, dtype=torch.bool)
    return ((number.unsqueeze(-1) >= spans[:, 0]) & (number.unsqueeze(-1) < spans[:, 1])).any(-1)


def ranks(
    bits: Tensor,
    position: Tensor,
    score: Tensor,
    in_class: Tensor,
    window: Tensor,
    now: Tensor,
    start: Tensor,
    first_vote: Tensor,
    spans: Tensor | None,
    mean: bool,
) -> Tensor:
    """Priorities of tokens ``[N]`` of one head, −1 for a position that is empty or out of sight."""
    return priority(
        rules_of(bits.view(1)),
        scorer_of(mean),
        torch.zeros_like(position),
        window,
        position,
        score if int(bits) & 16 else None,
        now + 1 - torch.maximum(position, first_vote),
        now,
        in_class,
        pinned_in(spans, position - start),
    )


def score_select(
    logits: Tensor | None,
    lse: Tensor,
    score: Tensor | None,
    position: Tensor,
    work: Tensor,
    base: Tensor,
    granted: Tensor,
    windows: Tensor,
    bits: Tensor,
    start: Tensor,
    seen: Tensor,
    first_vote: Tensor,
    valid: Tensor | None,
    spans: Tensor | None,
    first_head: int,
    vote: str,
    mean: bool,
    window: int,
    block: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Raise the scores by the token's attention, then rank what every piece holds.

    Args:
        logits: ``[G, Ns]`` of this group's scored slots, as `decode_split` left them, or None.
        lse: ``[B, H, G]`` of the whole softmax.
        score: ``[Ns + 1]`` float32, changed in place, or None.
        position, work, window, block, chunk: as for `decode_split`.
        base: ``[B, Hg]`` int64 first slot of each segment of the group.
        granted: ``[B, H]`` int32 slots that a segment may use: its first ones.
        windows: ``[B, H]`` int32 local windows; bits: ``[H]``, see `row_advance.rule_bits`.
        start: ``[B]``, the token's own included; seen: int64 scalar with it.
        first_vote: int64 scalar, first position whose votes counted.
        valid, spans: as for `row_advance`.
        first_head: of the group, in the layer's own order.
        vote: ``none``, ``one`` (raw sums and means) or ``index`` (lift).
        mean: whether scores are ranked per vote.

    Returns:
        Per piece the lowest priority float32 and the first flat slot int64 that has it; +inf where
        nothing may be given up, −inf where a slot is free.
    """
    now = seen - 1
    rank = torch.empty(len(work), device=lse.device)
    slot = torch.empty(len(work), dtype=torch.int64, device=lse.device)
    weight = vote_weight(now, start, valid, vote, lse.shape[-1])
    for index, (first, slots, row, head) in enumerate(work.tolist()):
        part = slice(first, first + slots)
        held, begin = position[part].long(), start[row].long()
        scored = bool(int(bits[head]) & 16) and score is not None
        if scored and logits is not None and vote != "none":
            share = torch.exp(logits[:, part] - lse[row, head, :, None]) * weight[row]
            share = share.sum(0).masked_fill(~sees(now, held, begin, window, block), 0.0)
            assert score is not None
            score[part] += share
        own = score[part] if scored and score is not None else torch.zeros(slots)
        held = held.masked_fill(~sees(now + 1, held, begin, window, block), -1)
        only = bool(int(bits[head]) & 3) and not int(bits[head]) & 8
        value = ranks(
            bits[head],
            held,
            own,
            torch.full_like(held, only, dtype=torch.bool),
            windows[row, head],
            now,
            begin,
            first_vote,
            None if spans is None else spans[row],
            mean,
        )
        low = first - int(base[row, head - first_head])
        value[max(0, int(granted[row, head]) - low) :] = torch.inf
        rank[index], slot[index] = value.min(), first + int(value.argmin())
    return rank, slot
