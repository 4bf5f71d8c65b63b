"""Who votes for what where sums are estimated, and that the estimate has no bias."""

from __future__ import annotations

import pytest
import torch

from kvcompress.errors import PlanError
from kvcompress.evict.score_queries import far_weight, pair_weight, votes_for_its_stride
from kvcompress.evict.scorers import SCORERS, Scorer, scorer
from kvcompress.plan import Plan, uniform
from kvcompress.recipe import Keep, Recipe
from kvcompress.registry import SUMS
from tests.evict.prompts import prompt, ranks_of

LENGTH = 400


@pytest.mark.parametrize("stride", [2, 5, 8, 32, 100])
def test_one_row_of_every_stride_votes_and_each_place_comes_equally_often(stride):
    blocks = 4096
    votes = votes_for_its_stride(torch.arange(stride * blocks), stride).view(blocks, stride)
    assert (votes.sum(1) == 1).all()
    share = votes.double().mean(0) * stride
    assert (share - 1).abs().max() < 2 * stride / blocks + 1e-3  # no more than rounding of a count
    following = votes.long().argmax(1)
    assert (following[1:] != following[:-1]).double().mean() > 0.9 or stride == 2


def test_no_row_before_the_first_real_token_votes():
    assert not votes_for_its_stride(torch.arange(-300, 0), 4).any()
    assert (far_weight(torch.arange(-300, 0), torch.tensor(-400), 4) == 0).all()


def test_weights_of_pairs():
    number, near, stride, first = torch.arange(LENGTH), 24, 8, LENGTH - 24
    weight = pair_weight(number, number, first, near, stride)
    back = number[:, None] - number
    sampled = votes_for_its_stride(number, stride)
    for row, key in ((0, 0), (30, 7), (399, 0), (380, 2), (100, 77)):
        assert weight[row, key] == 1  # near, or one of the last rows
    far = (back >= near) & (number < first)[:, None]
    assert (weight[~far & (back >= 0)] == 1).all()
    assert (weight[far & sampled[:, None]] == stride).all()
    assert (weight[far & ~sampled[:, None]] == 0).all()


def shifted_estimates(attention, stride, near, shifts):
    """Estimated column sums, with the strides' numbers moved on by each of `shifts`."""
    number = torch.arange(attention.shape[-1])
    moved = number + torch.arange(shifts)[:, None] * stride
    sampled = votes_for_its_stride(moved, stride) * float(stride)
    far = torch.where(number >= len(number) - near, 1.0, sampled).double()
    close = number[:, None] - number < near
    return (attention * close).sum(0) + far @ (attention * ~close)


@pytest.mark.parametrize("name", ["raw", "mean", "lift"])
def test_the_expected_sums_are_the_exact_ones(name):
    """Over all places that a stride's voter may have; so are the ranks, whose votes are fixed."""
    stride, near, shifts = 8, 24, 4096
    attention = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) * 2
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    attention = attention.masked_fill(hidden, -torch.inf).softmax(-1).double()
    attention = attention * scorer(name).row_weight(torch.arange(LENGTH))[:, None]
    exact = attention.sum(0)
    found = shifted_estimates(attention, stride, near, shifts)
    spread = found.std(0)
    bias = found.mean(0) - exact
    assert spread[:300].min() > 10 * bias.abs().max() > 0
    torch.testing.assert_close(found.mean(0), exact, rtol=2e-3, atol=0)
    # what only near and last rows see is not estimated at all
    sure = torch.arange(LENGTH) >= LENGTH - 2 * near
    assert (spread[sure] < 1e-9).all() and (spread[~sure] > 0).all()


def test_sums_are_those_of_the_scorers_that_add_weighted_attention_up():
    for name in SCORERS:
        kind = type(scorer(name))
        adds = kind.collect is Scorer.collect and kind.merge is Scorer.merge
        adds = adds and kind.uses_attention and not kind.across_heads
        assert (name in SUMS) == adds, name


@pytest.mark.parametrize("name", sorted(SUMS))
def test_estimates_of_a_padded_row_are_its_own(name):
    data = prompt(5, length=60, pads=(13, 0))
    data.budget = torch.tensor([[6, 2], [9, 4]])
    both = ranks_of(scorer(name), data, score_rows=6, score_stride=4)
    alone = ranks_of(scorer(name), data.row(0), score_rows=6, score_stride=4)[0]
    torch.testing.assert_close(both[0, :, 13:], alone, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(both, ranks_of(scorer(name), data))


# ---- what is refused, and what stays as it was written
def tiny_plan(shape, **settings):
    from kvcompress.plan import HeadPlan

    return uniform(shape, HeadPlan(full=True), **settings)


@pytest.fixture
def shape(tiny_llama):
    from kvcompress.runtime.model.families import shape_of

    return shape_of(tiny_llama.config, tiny_llama.dtype)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_rows": None, "score_stride": 8}, "score_stride 8 without score_rows"),
        ({"score_rows": 8, "score_stride": 1}, "greater than or equal to 2"),
        ({"score_rows": 8, "score_stride": 4, "scorer": "tova"}, "tova adds none up.*critical"),
        ({"score_rows": 8, "score_stride": 4, "scorer": "random"}, "random adds none up"),
    ],
)
def test_what_cannot_be_estimated_is_refused(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        Keep(**settings)
    with pytest.raises(ValueError, match=message):
        tiny_plan(shape, **settings)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, (64, 32)),
        ({"scorer": "raw"}, (64, 32)),
        ({"scorer": "tova"}, (None, None)),
        ({"scorer": "key_norm"}, (None, None)),
        ({"score_rows": None}, (None, None)),
        ({"score_rows": 16}, (16, None)),
        ({"score_stride": None}, (None, None)),
        ({"score_stride": 8}, (64, 8)),
        ({"score_rows": 16, "score_stride": 8}, (16, 8)),
    ],
)
def test_who_votes_where_a_recipe_does_not_say(said, meant):
    """Estimates are the default of recipes; of plans, which are written in full, they are not."""
    keep = Keep(**said)
    assert (keep.score_rows, keep.score_stride) == meant
    again = Keep.model_validate(keep.model_dump())
    assert again == keep
    assert Recipe.from_yaml(Recipe(keep=keep).to_yaml()).keep == keep


def test_a_plan_without_a_stride_is_written_as_before(shape):
    plan = tiny_plan(shape, score_rows=8)
    assert tiny_plan(shape).score_rows is None
    exact = Keep(score_rows=None)
    assert "score_stride" not in plan.to_json() and "score_stride" not in exact.model_dump()
    assert Plan.from_json(plan.to_json()) == plan and plan.score_stride is None
    strided = tiny_plan(shape, score_rows=8, score_stride=4)
    assert Plan.from_json(strided.to_json()) == strided != plan
    with pytest.raises(PlanError, match="without score_rows"):
        Plan.from_json(strided.to_json().replace('"score_rows": 8', '"score_rows": null'))
