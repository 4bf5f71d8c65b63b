"""One step's eviction on made-up arrays: equal ranks, class tokens, full and empty segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress.evict.keepset import PUNCT_SCORE, SPECIAL_SCORE
from kvcompress.kernels.row_advance.reference import rule_bits
from kvcompress.kernels.tuning import work_list
from kvcompress.kernels.view import (
    CodesView,
    Combined,
    ExactView,
    Field,
    GroupView,
    HeadsView,
    KeyConstants,
    PiecesView,
    Reach,
    RoomView,
    RowsView,
    RuleView,
    StepView,
    TokenView,
    flat,
    leaves,
)
from kvcompress.quant.codec import encode
from tests.kernels.cases import chunks_of, random

NOW, SINKS, RECENT, DIM = 60, 2, 5, 16
# slots, keeps classes, ranks by score, has room for the rest, keeps scores
HEADS = [(9, 3, True, True, True), (70, 0, True, True, True), (0, 0, True, True, True)]
UNSCORED = [(12, 0, False, True, False), (20, 1, False, False, False)]


def shared(vote: str, mean: bool) -> tuple[ExactView, RowsView, RoomView, RuleView]:
    """What the kernels share for three rows: full, not yet full, padded."""
    heads = HEADS + UNSCORED
    position = torch.tensor([[0, 1], [0, 1], [4, 5]])
    recent = torch.tensor([[58, 59, 55, 56, 57], [58, 59, -1, -1, 57], [55, 56, 57, 58, 59]])
    flags = torch.tensor([[0, 0, 2, 0, 1, 0, 3], [0] * 7, [0, 0, 1, 1, 1, 1, 1]])
    vectors = [random(3, len(heads), SINKS + RECENT, DIM, seed=s) for s in (3, 4)]
    spans = torch.tensor([[[0, 9], [30, 33]], [[0, 0], [0, 0]], [[1, 2], [55, 90]]]).int()
    windows = torch.tensor([[3, 0, 0, 12, 0]] * 3, dtype=torch.int32)
    return (
        ExactView(*vectors, torch.cat([position, recent], 1).int(), flags.to(torch.uint8), SINKS),
        RowsView(
            torch.tensor(NOW + 1),
            torch.tensor([0, 0, 4], dtype=torch.int32),
            torch.tensor([60, 5, 56], dtype=torch.int32),
            torch.tensor([[0, 2, 3, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32),
            torch.tensor([True, True, False]),
        ),
        RoomView(
            torch.tensor([[6, 50, 9, 12, 0]] * 3, dtype=torch.int32),
            torch.tensor([7, 2**30, 2**30, 2**30, 2**30], dtype=torch.int32),
            torch.tensor([c for c, *_ in heads], dtype=torch.int32),
        ),
        RuleView(bits(heads), windows, torch.tensor(0), spans, vote, mean, Reach(0, 0)),
    )


def bits(heads: list[tuple[int, int, bool, bool, bool]]) -> Tensor:
    _, classes, by_score, rest, scored = (
        torch.tensor(column) for column in zip(*heads, strict=True)
    )
    return rule_bits(classes, by_score, rest, scored)


def group(
    heads: list[tuple[int, int, bool, bool, bool]], first: int, first_work: int = 0
) -> tuple[GroupView, PiecesView, Tensor | None]:
    """Flat arrays of one group for three rows, and logits; what of them is scored comes first."""
    batch, total, segments = 3, 0, []
    base = torch.zeros(batch, len(heads), dtype=torch.int64)
    for member, (capacity, *_) in enumerate(heads):
        for row in range(batch):
            segments.append((total, capacity, row, first + member))
            base[row, member] = total
            total += capacity
    generator = torch.Generator().manual_seed(first)
    position = torch.randint(2, 55, (total + 1,), generator=generator).int()
    position[5], position[total - 3 :] = -1, -1
    score = torch.rand(total + 1, generator=generator) + 0.25
    score[torch.arange(total + 1) % 4 == 0] = 0.25  # equal ranks, and none is lower
    score[3::17], score[4::19] = PUNCT_SCORE, SPECIAL_SCORE
    scored = heads[0][4]
    k, v = (
        CodesView.of(encode(random(total + 1, DIM, seed=first), "int8"), "int8", DIM)
        for _ in range(2)
    )
    recent_score = torch.full((batch, len(heads), RECENT), 0.25) if scored else None
    return (
        GroupView(k, v, position, score if scored else None, recent_score),
        PiecesView(torch.tensor(work_list(segments, 64)), base, first, first_work, 64),
        random(2, total, seed=first + 1) if scored else None,
    )


def run(kernels: Any, vote: str, mean: bool) -> dict[str, Tensor]:
    """row_advance, then score_select and kv_append of both groups; everything they leave."""
    batch, heads, queries = 3, len(HEADS + UNSCORED), 2
    exact, rows, room, rule = shared(vote, mean)
    flags = torch.tensor([2, 1, 1], dtype=torch.uint8)
    advanced = kernels.row_advance(flags, exact, rows, room, rule)
    combined = Combined(
        torch.empty(0),
        random(batch, heads, queries, seed=1) + 2,
        random(batch, heads, queries, SINKS + RECENT + 1, seed=2),
    )
    vectors = [random(batch, heads, 1, DIM, seed=s) for s in (5, 6)]
    token = TokenView(random(batch, heads * queries, 1, DIM, seed=9), *vectors, flags)
    first = group(HEADS, 0)
    parts = [first, group(UNSCORED, len(HEADS), len(first[1].work))]
    work = torch.cat([pieces.work for _, pieces, _ in parts])
    constants = random(heads, DIM, seed=7), random(heads, DIM, seed=8).abs() + 0.5
    order = torch.arange(heads).flip(0)
    own = HeadsView(order, KeyConstants(*constants), chunks_of(work, batch, heads, 0))
    left = {"exact": exact, "rows": rows, "advanced": advanced}
    for number, (held, pieces, logits) in enumerate(parts):
        weakest = kernels.score_select(
            logits, combined.lse, advanced.granted, held, pieces, rows, rule
        )
        step = StepView(combined, advanced, weakest)
        kernels.kv_append(token, exact, own, held, pieces, rows, rule, step, None)
        left |= {f"weakest {number}": weakest, f"group {number}": held}
    return {
        leaf.name: tensor
        for name, view in left.items()
        for leaf, tensor in zip(leaves(Field(name, type(view), False)), flat([view]), strict=True)
        if isinstance(tensor, Tensor)
    }
