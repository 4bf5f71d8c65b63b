"""One suite over the registry of scorers, and the property that tells lift from raw sums."""

from __future__ import annotations

import pytest
import torch

from kvcompress.evict.keepset import (
    PUNCT_FLAG,
    SPECIAL_FLAG,
    HeadRules,
    class_mask,
    class_score,
    priority,
    turn_quota,
)
from kvcompress.evict.scorers import SCORERS, scorer
from kvcompress.plan import Budget, HeadPlan


def uniform_attention_ranks(name: str, length: int) -> torch.Tensor:
    """Rank of every token after `length` rows of uniform causal attention."""
    ranked = scorer(name)
    rows = torch.arange(length)
    weight = ranked.row_weight(rows)
    attention = torch.ones(length, length).tril() / (rows + 1.0)[:, None]
    score = (attention * weight[:, None]).sum(0)
    return ranked.rank(score, length - rows, length - 1)


def test_uniform_attention_favours_early_tokens_in_raw_sums_and_none_in_lift():
    raw, lift = uniform_attention_ranks("raw", 4096), uniform_attention_ranks("lift", 4096)
    assert raw[0] == pytest.approx(8.90, abs=0.01)  # H_4096
    assert raw[2048] == pytest.approx(0.69, abs=0.01)
    torch.testing.assert_close(lift, torch.ones(4096), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_registry(name):
    found = scorer(name)
    key, position = torch.randn(2, 3, 5, 8), torch.arange(5).expand(2, 3, 5)
    head = torch.arange(3)[None, :, None].expand(2, 3, 5)
    first = found.initial(key, position, head)
    assert found.name == name
    assert first.shape == (2, 3, 5) and first.dtype == torch.float32
    assert torch.equal(first, found.initial(key, position, head))
    votes = found.uses_attention or "repeat" in found.needs
    assert (found.row_weight(torch.arange(4)) > 0).all() == votes
    larger = found.rank(torch.tensor([1.0, 2.0]), torch.tensor([3, 3]), 10)
    assert larger[1] > larger[0]


def test_random_differs_by_position_and_head_and_is_uniform():
    position = torch.arange(4000)
    values = scorer("random").initial(torch.zeros(4000, 1), position, torch.zeros(4000))
    other = scorer("random").initial(torch.zeros(4000, 1), position, torch.ones(4000))
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([values, other]))[0, 1]) < 0.05


def test_priority_orders_span_special_local_punct_then_score():
    heads = [
        HeadPlan(special=True, punct=True, frequent=Budget(tokens=1), local=Budget(tokens=2)),
        HeadPlan(punct=True),
        HeadPlan(local=Budget(tokens=2)),
    ]
    rules = HeadRules.of(heads, torch.device("cpu"))
    windows = torch.tensor([[2], [0], [2]])
    position = torch.tensor([-1, 2, 3, 4, 5, 6, 9, 10])
    flags = torch.tensor([0, SPECIAL_FLAG, 3, PUNCT_FLAG, PUNCT_FLAG, 0, 0, 0])
    score = class_score(
        rules.classes[:1, None], flags, torch.tensor([[9e9, 5.0, 1.0, 0.0, 1.0, 7.0, 1.0, 0.0]])
    )
    pinned = position == 6

    def order(score, **kw):
        return priority(
            rules, scorer("raw"), torch.arange(3)[:, None], windows, position, score,
            torch.ones(3, 8), 10, **kw,
        ).argsort(1, descending=True).tolist()  # fmt: skip

    # special by age (a token of both classes is special), local by age, punctuation by age, score
    assert order(score)[0] == [2, 1, 7, 6, 4, 3, 5, 0]
    assert order(score, pinned=pinned)[0][:4] == [5, 2, 1, 7]
    unscored = order(None, in_class=(flags & rules.classes[:, None]) != 0)
    assert unscored[1][:3] == [4, 3, 2]
    assert unscored[2][:4] == [7, 6, 5, 4]
    assert [class_mask(h) for h in heads] == [3, 2, 0]


def test_turn_quota_keeps_the_best_of_every_turn():
    rank = torch.tensor([5.0, 4.0, 3.0, 9.0, 8.0, -torch.inf, 7.0, 1.0])
    turn = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    segment = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    pinned = torch.tensor([True] + [False] * 7)
    tier = turn_quota(rank, segment, turn, torch.full((8,), 1), pinned)
    assert tier.tolist() == [2, 1, 0, 1, 0, 0, 0, 1]
    tier = turn_quota(rank, segment, turn, torch.full((8,), 2), None)
    assert tier.tolist() == [1, 1, 0, 1, 1, 0, 0, 1]
