"""One step's eviction on made-up arrays: equal ranks, class tokens, full and empty segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress.evict.keepset import PUNCT_SCORE, SPECIAL_SCORE
from kvcompress.kernels.row_advance.reference import rule_bits
from kvcompress.kernels.tuning import work_list
from kvcompress.quant.codec import Codes, encode
from tests.kernels.cases import random

NOW, SINKS, RECENT, DIM = 60, 2, 5, 16
# slots, keeps classes, ranks by score, has room for the rest, keeps scores
HEADS = [(9, 3, True, True, True), (70, 0, True, True, True), (0, 0, True, True, True)]
UNSCORED = [(12, 0, False, True, False), (20, 1, False, False, False)]


def rows() -> dict[str, Any]:
    """Arguments of row_advance for three rows: full, not yet full, padded."""
    heads = HEADS + UNSCORED
    position = torch.tensor([[0, 1], [0, 1], [4, 5]])
    recent = torch.tensor([[58, 59, 55, 56, 57], [58, 59, -1, -1, 57], [55, 56, 57, 58, 59]])
    flags = torch.tensor([[0, 0, 2, 0, 1, 0, 3], [0] * 7, [0, 0, 1, 1, 1, 1, 1]])
    return {
        "exact_position": torch.cat([position, recent], 1).int(),
        "exact_class": flags.to(torch.uint8),
        "row_seen": torch.tensor([60, 5, 56], dtype=torch.int32),
        "start": torch.tensor([0, 0, 4], dtype=torch.int32),
        "class_counts": torch.tensor([[0, 2, 3, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32),
        "seen": torch.tensor(NOW + 1),
        "valid": torch.tensor([True, True, False]),
        "flags": torch.tensor([2, 1, 1], dtype=torch.uint8),
        "budget": torch.tensor([[6, 50, 9, 12, 0]] * 3, dtype=torch.int32),
        "cap": torch.tensor([7, 2**30, 2**30, 2**30, 2**30], dtype=torch.int32),
        "capacity": torch.tensor([c for c, *_ in heads], dtype=torch.int32),
        "bits": bits(heads),
        "spans": torch.tensor([[[0, 9], [30, 33]], [[0, 0], [0, 0]], [[1, 2], [55, 90]]]).int(),
        "sink_tokens": SINKS,
    }


def bits(heads: list[tuple[int, int, bool, bool, bool]]) -> Tensor:
    _, classes, by_score, rest, scored = (
        torch.tensor(column) for column in zip(*heads, strict=True)
    )
    return rule_bits(classes, by_score, rest, scored)


def group(heads: list[tuple[int, int, bool, bool, bool]], first: int) -> dict[str, Any]:
    """Flat arrays of one group for three rows; what of them is scored comes first."""
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
    codes = encode(random(total + 1, DIM, seed=first), "int8")
    return {
        "position": position,
        "score": score if scored else None,
        "logits": random(2, total, seed=first + 1) if scored else None,
        "recent_score": torch.full((batch, len(heads), RECENT), 0.25) if scored else None,
        "codes": codes,
        "work": torch.tensor(work_list(segments, 64)),
        "base": base,
        "first_head": first,
    }


def run(kernels: Any, vote: str, mean: bool) -> dict[str, Tensor]:
    """row_advance, then score_select and kv_append of both groups; everything they leave."""
    batch, heads, group_rows = 3, len(HEADS + UNSCORED), 2
    a = rows()
    notes, granted = kernels.row_advance(**a)
    left = {name: a[name] for name in ("exact_position", "exact_class", "row_seen", "start")}
    left |= {"class_counts": a["class_counts"], "notes": notes, "granted": granted}
    lse = random(batch, heads, group_rows, seed=1) + 2
    exact_logits = random(batch, heads, group_rows, SINKS + RECENT + 1, seed=2)
    exact = [random(batch, heads, SINKS + RECENT, DIM, seed=s) for s in (3, 4)]
    token = [random(batch, heads, 1, DIM, seed=s) for s in (5, 6)]
    windows = torch.tensor([[3, 0, 0, 12, 0]] * batch, dtype=torch.int32)
    shared = (a["start"], a["seen"], torch.tensor(0), a["valid"], a["spans"])
    parts = [group(HEADS, 0), group(UNSCORED, len(HEADS))]
    chunks, first_work = torch.zeros(batch, heads, 2, dtype=torch.int64), 0
    for part in parts:
        for number, (_, _, row, head) in enumerate(part["work"].tolist()):
            if not chunks[row, head, 1]:
                chunks[row, head, 0] = first_work + number
            chunks[row, head, 1] += 1
        first_work += len(part["work"])
    first_work = 0
    for number, part in enumerate(parts):
        rank, slot = kernels.score_select(
            part["logits"],
            lse,
            part["score"],
            part["position"],
            part["work"],
            part["base"],
            granted,
            windows,
            a["bits"],
            *shared,
            part["first_head"],
            vote,
            mean,
            0,
            0,
            64,
        )
        own = part["base"].shape[1]
        values = Codes(*(t.clone() for t in vars_of(part["codes"])))
        kernels.kv_append(
            *token,
            *exact,
            torch.arange(heads).flip(0),
            random(heads, DIM, seed=7),
            random(heads, DIM, seed=8).abs() + 0.5,
            part["codes"],
            values,
            "int8",
            "int8",
            part["position"],
            part["score"],
            part["recent_score"],
            None,
            exact_logits,
            lse,
            notes,
            granted,
            rank,
            slot,
            chunks,
            windows,
            a["bits"],
            *shared,
            part["first_head"],
            own,
            first_work,
            SINKS,
            vote,
            mean,
            0,
            0,
        )
        first_work += len(part["work"])
        held = {"rank": rank, "slot": slot, "position": part["position"]}
        held |= {"score": part["score"], "recent_score": part["recent_score"]}
        held |= dict(zip(("k", "k_scale", "k_minimum"), vars_of(part["codes"]), strict=True))
        held |= dict(zip(("v", "v_scale", "v_minimum"), vars_of(values), strict=True))
        left |= {f"{name} of group {number}": t for name, t in held.items() if t is not None}
    left |= {"exact_k": exact[0], "exact_v": exact[1]}
    return left


def vars_of(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    assert codes.scale is not None
    assert codes.minimum is not None
    return codes.data, codes.scale, codes.minimum
