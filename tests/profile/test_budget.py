"""Spending bytes: within the budget, never worse with more, and close to the best there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.profile.budget import Choice, frontier, hull, minimum_bytes, spend

choice = st.builds(Choice, st.integers(1, 60), st.integers(0, 1000).map(float), st.integers(0, 9))
problems = st.lists(st.lists(choice, min_size=1, max_size=6), min_size=1, max_size=5)


def loss(choices):
    return sum(c.loss for c in choices)


@given(problems, st.integers(0, 300))
def test_it_stays_within_the_budget_and_takes_one_choice_of_each_head(heads, extra):
    budget = minimum_bytes(heads) + extra
    taken = spend(heads, budget)
    assert sum(c.size_bytes for c in taken) <= budget
    assert all(c in own for c, own in zip(taken, heads, strict=True))


@settings(max_examples=30)
@given(problems)
def test_a_larger_budget_never_gives_a_larger_loss(heads):
    least = minimum_bytes(heads)
    most = sum(max(c.size_bytes for c in own) for own in heads)
    losses = [loss(spend(heads, budget)) for budget in range(least, most + 2)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == sum(min(c.loss for c in own) for own in heads)


@given(problems, st.integers(0, 300))
def test_it_is_within_one_upgrade_of_the_best(heads, extra):
    budget = minimum_bytes(heads) + extra
    fitting = [
        loss(combination)
        for combination in itertools.product(*heads)
        if sum(c.size_bytes for c in combination) <= budget
    ]
    one_upgrade = max(max(c.loss for c in own) - min(c.loss for c in own) for own in heads)
    assert min(fitting) <= loss(spend(heads, budget)) <= min(fitting) + one_upgrade


def test_bytes_go_where_they_buy_most():
    flat = [Choice(10, 1.0, 0), Choice(20, 0.9, 1)]
    steep = [Choice(10, 1.0, 0), Choice(20, 0.1, 1)]
    assert [c.column for c in spend([flat, steep], 30)] == [0, 1]


def test_what_is_left_buys_an_upgrade_off_the_hull():
    head = [Choice(0, 10.0, 0), Choice(5, 9.0, 1), Choice(10, 0.0, 2)]
    assert hull(frontier(head)) == [0, 2]
    assert [c.column for c in spend([head], 7)] == [1]


def test_dominated_choices_are_dropped():
    head = [Choice(5, 3.0, 0), Choice(5, 2.0, 1), Choice(9, 2.0, 2), Choice(4, 8.0, 3)]
    assert [c.column for c in frontier(head)] == [3, 1]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="9 bytes do not hold the smallest choices"):
        spend([[Choice(10, 1.0, 0)]], 9)
