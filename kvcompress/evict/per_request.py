"""Decisions for each row at the end of its prompt: shared budgets, thresholds, keep-sets.

Pure functions of ranks and attention weights. Ties go to the earlier head, then to the earlier
token, so that the same prompt always gets the same decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.rules import FastGenChoice

LOW_QUANTILE: Final = 0.05  # of rows, as in `kvcompress.profile.measure`
_ROUNDING: Final = 1e-9  # taken off before rounding up: in floats 0.1 · 30 is above 3


def pooled_budgets(rank: Tensor, budget: Tensor, floor: float) -> list[list[int]]:
    """How many tokens each head keeps when heads share their budgets, so that the best of all stay.

    The heads may be those of a layer, or those of all layers side by side. Their ranks need one
    unit. Attention weights (sums, means, lift, the largest one) and logarithms of contributions
    to the output are; norms of keys, or cosines, compare only as far as the heads are alike.

    Source: AdaKV (arXiv 2407.11550), algorithm 1, which keeps most attention under the sum of the
    budgets. Differs from the paper: its safeguard mixes the pooled counts with equal shares; here
    the best ``floor`` share of each head is kept first, and the rest of the sum goes to the best of
    the others.

    Args:
        rank: ``[B, H, N]``, −inf where a token is no candidate.
        budget: ``[B, H]`` int, what each head would keep alone.
        floor: share of its own budget that every head keeps, as far as it has candidates.

    Returns:
        ``[B][H]``; a row's sum is that of its budgets. What a head cannot use goes to the others;
        what no head can use stays with the heads that brought it, for tokens still to come.
    """
    batch, heads, count = rank.shape
    if not count:
        return budget.tolist()
    order = rank.argsort(dim=-1, descending=True, stable=True)
    ordered = rank.gather(-1, order)
    candidate = ordered > -torch.inf
    least = [[math.ceil(floor * b - _ROUNDING) for b in row] for row in budget.tolist()]
    place = torch.arange(count, device=rank.device)
    safe = candidate & (place < torch.tensor(least, device=rank.device).unsqueeze(-1))
    total = torch.minimum(budget.sum(-1).to(rank.device), candidate.sum((1, 2)))
    # the best first; then the safe ones before the others, each in their order
    pool = ordered.flatten(1).argsort(dim=-1, descending=True, stable=True)
    unsafe = (~safe).flatten(1).gather(1, pool).to(torch.int8)
    pool = pool.gather(1, unsafe.argsort(dim=-1, stable=True))
    granted = torch.arange(heads * count, device=rank.device) < total.unsqueeze(-1)
    counts = torch.zeros(batch, heads, dtype=torch.int64, device=rank.device)
    counts.scatter_add_(1, pool // count, granted.long())
    rows = zip(budget.tolist(), counts.tolist(), strict=True)
    return [_with_rest(own, line) for own, line in rows]


def _with_rest(budget: list[int], granted: list[int]) -> list[int]:
    """`granted`, plus the rest of the summed budgets, dealt out by what each head left unused."""
    rest = sum(budget) - sum(granted)
    unused = [max(0, b - g) for b, g in zip(budget, granted, strict=True)]
    parts = [rest * u // max(1, sum(unused)) for u in unused]
    for head in sorted(range(len(unused)), key=lambda h: -unused[h])[: rest - sum(parts)]:
        parts[head] += 1
    return [g + part for g, part in zip(granted, parts, strict=True)]


def threshold_counts(rank: Tensor, at_least: float, cap: Tensor) -> list[list[int]]:
    """How many tokens each head keeps when all that rank at least `at_least` stay, up to `cap`.

    Args:
        rank: ``[B, H, N]``, −inf where a token is no candidate.
        cap: ``[B, H]`` int.

    Returns:
        ``[B][H]``.
    """
    good = (rank >= at_least) & (rank > -torch.inf)
    return torch.minimum(good.sum(-1), cap.to(rank.device)).tolist()


@dataclass(frozen=True, slots=True)
class NewestRows:
    """The newest W query rows of a prompt of N tokens, and the tokens that they see.

    Attributes:
        probability: ``[B, H, G, W, N]`` attention of the rows.
        query_position: ``[W]``, each one of `key_position`.
        key_position: ``[N]`` ascending, pads counted.
        valid: ``[B, N]`` bool, False for padding.
        special, punct: ``[B, N]`` bool, the token classes. Tokens that are kept in any case may
            count as special: every keep-set holds those.
        rank: ``[B, H, N]``; the `frequent` tokens are those of the largest rank.
    """

    probability: Tensor
    query_position: Tensor
    key_position: Tensor
    valid: Tensor
    special: Tensor
    punct: Tensor
    rank: Tensor


@dataclass(frozen=True, slots=True)
class KeepSizes:
    """How many tokens the parts of a keep-set hold.

    Attributes:
        sinks, recent: first and newest real tokens, which every keep-set holds.
        frequent, local: ``[B]`` int, budgets resolved for each row.
    """

    sinks: int
    recent: int
    frequent: Tensor
    local: Tensor


def fastgen_choice(rows: NewestRows, sizes: KeepSizes, rule: FastGenChoice) -> list[list[int]]:
    """Which keep-set of `keep_set_ladder` each head takes: the first that recovers enough.

    The recovery of a row is what it keeps of its attention; that of a head is what all but the
    worst 5 % of the given rows recover, in the worst of its query heads.

    Source: FastGen (arXiv 2310.01801), equation 1. Differs from the paper: see
    `kvcompress.profile.measure`; the last rows only, a low quantile over rows in place of a norm,
    and in every row the best tokens of the past, never of the future.

    Args:
        rule: T and its reading. ``mass`` asks for kept attention ≥ T, ``l1`` for
            ‖A − Â‖₁ = 2 (1 − kept) ≤ 1 − T.

    Returns:
        ``[B][H]`` index into the ladder, 0 to 4; 4, everything, where no row has a real query.
    """
    device, valid, special, punct = rows.probability.device, rows.valid, rows.special, rows.punct
    number = valid.long().cumsum(-1)  # 1 at the row's first real token
    age = rows.query_position[:, None] - rows.key_position[None, :]  # [W, N]
    seen = valid[:, None] & (age >= 0)
    sink = (number <= sizes.sinks)[:, None]
    always = sink | special[:, None] | (age < sizes.recent)
    local = age[None] < sizes.local.to(device).view(-1, 1, 1)
    fixed = always | punct[:, None]
    rest = seen & ~(special | punct)[:, None] & ~sink & (age >= sizes.recent)
    budget = sizes.frequent.to(device)
    kept = (
        always[:, None],
        fixed[:, None],
        fixed[:, None] | _best_of_each_row(rows.rank, rest, budget),
        (fixed | local)[:, None] | _best_of_each_row(rows.rank, rest & ~local, budget),
    )
    real_row = valid[:, torch.searchsorted(rows.key_position, rows.query_position)]  # [B, W]
    enough = rule.recovery if rule.reading == "mass" else 1 - (1 - rule.recovery) / 2
    choice = torch.full(rows.probability.shape[:2], len(kept), device=device)
    for index in reversed(range(len(kept))):
        reached = _recovered(rows.probability, kept[index] & seen[:, None], real_row)
        choice = torch.where(reached >= enough, index, choice)
    return choice.tolist()


def _best_of_each_row(rank: Tensor, candidate: Tensor, budget: Tensor) -> Tensor:
    """``[B, H, W, N]``: each row's best `budget` ``[B]`` tokens, by rank, among its candidates.

    Args:
        rank: ``[B, H, N]``, one for all rows.
        candidate: ``[B, W, N]``.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True).unsqueeze(2)
    shape = (*rank.shape[:2], *candidate.shape[1:])
    offered = candidate[:, None].expand(shape).gather(-1, order.expand(shape))
    place = offered.cumsum(-1, dtype=torch.int32)
    chosen = offered & (place <= budget.view(-1, 1, 1, 1))
    return torch.zeros_like(offered).scatter_(-1, order.expand(shape), chosen)


def _recovered(probability: Tensor, kept: Tensor, real_row: Tensor) -> Tensor:
    """``[B, H]`` recovery as 1 − dropped, because learned sinks, part of a softmax, always stay.

    Args:
        kept: ``[B, 1 or H, W, N]``.
        real_row: ``[B, W]``, False where the query is padding; NaN for a row of padding alone.
    """
    dropped = (probability * ~kept.unsqueeze(2)).sum(-1)  # [B, H, G, W]
    mass = (1 - dropped).masked_fill(~real_row[:, None, None], torch.nan)
    return torch.nanquantile(mass, LOW_QUANTILE, dim=-1).amin(-1)
