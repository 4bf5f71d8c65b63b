"""Votes of one decoded token on stored tokens, and each piece's weakest token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.keepset import HeadRules, priority
from kvcompress.evict.scorers import Scorer, scorer
from kvcompress.kernels.decode_split.reference import sees
from kvcompress.kernels.view import GroupView, PiecesView, RowsView, RuleView, Weakest


def rules_of(bits: Tensor) -> HeadRules:
    """`HeadRules` from the bits of `row_advance.rule_bits`."""
    return HeadRules(bits & 3, (bits & 4) != 0, (bits & 8) != 0)


def scorer_of(mean: bool) -> Scorer:
    return scorer("mean" if mean else "raw")


def vote_weight(rows: RowsView, vote: str, queries: int) -> Tensor:
    """``[B]`` weight of each query's attention: nothing, ``one``, or ``index`` + 1 as in lift."""
    weight = torch.zeros_like(rows.start, dtype=torch.float32)
    if vote != "none":
        weight += 1.0 if vote == "one" else (rows.seen - 1 - rows.start).float() + 1.0
    return (weight if rows.valid is None else weight * rows.valid) / queries


def pinned_in(spans: Tensor | None, number: Tensor) -> Tensor:
    """Whether the `number`-th real token of a row lies in one of its ``[S, 2]`` spans."""
    if spans is None:
        return torch.zeros_like(number, dtype=torch.bool)
    return ((number.unsqueeze(-1) >= spans[:, 0]) & (number.unsqueeze(-1) < spans[:, 1])).any(-1)


def ranks(
    rule: RuleView,
    rows: RowsView,
    at: tuple[int, int],
    position: Tensor,
    score: Tensor,
    in_class: Tensor,
) -> Tensor:
    """Priorities of tokens ``[N]`` of one row and head `at`, −∞ where one is out of sight."""
    row, head = at
    bits, start = rule.bits[head], rows.start[row].long()
    held = position.masked_fill(~sees(rows.seen, position, start, rule.reach), -1)
    return priority(
        rules_of(bits.view(1)),
        scorer_of(rule.mean),
        torch.zeros_like(held),
        rule.windows[at],
        held,
        score if int(bits) & 16 else None,
        rows.seen - torch.maximum(held, rule.first_vote),
        rows.seen - 1,
        in_class,
        pinned_in(None if rule.spans is None else rule.spans[row], held - start),
    )


def score_select(
    logits: Tensor | None,
    lse: Tensor,
    granted: Tensor,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    rule: RuleView,
) -> Weakest:
    """Raise the scores by the token's attention, then rank what every piece holds.

    Args:
        logits: ``[G, Ns]`` of this group's scored slots, as `decode_pieces` left them, or None.
        lse: ``[B, H, G]``, see `Combined`; granted: ``[B, H]``, see `Advanced`.
        group: its scores are changed in place.
        rows: the token's own start included.
    """
    rank = torch.empty(len(pieces.work), device=lse.device)
    slot = torch.empty(len(pieces.work), dtype=torch.int64, device=lse.device)
    weight = vote_weight(rows, rule.vote, lse.shape[-1])
    for index, (first, slots, row, head) in enumerate(pieces.work.tolist()):
        part, bits = slice(first, first + slots), int(rule.bits[head])
        held, own = group.position[part].long(), torch.zeros(slots)
        if bits & 16 and group.score is not None:
            if logits is not None and rule.vote != "none":
                seen = sees(rows.seen - 1, held, rows.start[row].long(), rule.reach)
                share = torch.exp(logits[:, part] - lse[row, head, :, None]) * weight[row]
                group.score[part] += share.sum(0).masked_fill(~seen, 0.0)
            own = group.score[part]
        only = bool(bits & 3) and not bits & 8
        in_class = torch.full_like(held, only, dtype=torch.bool)
        value = ranks(rule, rows, (row, head), held, own, in_class)
        low = first - int(pieces.base[row, head - pieces.first_head])
        value[max(0, int(granted[row, head]) - low) :] = torch.inf
        rank[index], slot[index] = value.min(), first + int(value.argmin())
    return Weakest(rank, slot)
