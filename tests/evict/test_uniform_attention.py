"""What heavy-hitter scores say of attention that says nothing: a model that looks at all alike."""

from __future__ import annotations

import copy

import pytest
import torch

import kvcompress
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument

TOKENS, SINKS, RECENT, BUDGET = 120, 4, 16, 30


@pytest.fixture(scope="module")
def even_llama(tiny_llama):
    """Queries are zero, so every row shares its attention evenly over what it sees."""
    model = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    return model


def stores_after_a_prompt(model, scorer, score_rows=None, score_stride=None):
    """(positions, scores) of the coded tokens of each layer's heads, sorted by position."""
    plan = uniform(
        shape_of(model.config, model.dtype),
        HeadPlan(frequent=Budget(tokens=BUDGET)),
        sink_tokens=SINKS,
        recent_tokens=RECENT,
        scorer=scorer,
        score_rows=score_rows,
        score_stride=score_stride,
    )
    ids = torch.randint(3, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    kvcompress.attach(model, plan)
    try:
        cache = kvcompress.new_cache(model)
        with torch.no_grad():
            model(ids, **as_argument(cache), use_cache=True)
        cache.finish_prompt(model)
    finally:
        kvcompress.detach(model)
    found = []
    for layer in cache.compressed_layers:
        (group,) = layer.state.groups
        for start in group.store.starts[0]:
            own = slice(start, start + BUDGET)
            position, order = group.store.position[own].sort()
            found.append((position.tolist(), group.store.score[own][order].double()))
    return found


def harmonic(low: int, high: int) -> float:
    """1 / (low + 1) + … + 1 / high."""
    return sum(1 / row for row in range(low + 1, high + 1))


@pytest.mark.parametrize("scorer", ["raw", "mean"])
def test_sums_keep_the_oldest_tokens_whatever_they_are(even_llama, scorer):
    """Token i of n has the sum H_n − H_i, and divided by its n − i rows it still falls with i."""
    oldest = list(range(SINKS, SINKS + BUDGET))
    expected = torch.tensor([harmonic(i, TOKENS) for i in oldest], dtype=torch.float64)
    for position, score in stores_after_a_prompt(even_llama, scorer):
        assert position == oldest
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score_rows", [None, 32])
def test_lift_has_no_favourites(even_llama, score_rows):
    """Every token has lift 1: nothing but rounding decides."""
    votes = TOKENS if score_rows is None else score_rows
    for position, score in stores_after_a_prompt(even_llama, "lift", score_rows):
        rows = torch.tensor([min(votes, TOKENS - p) for p in position], dtype=torch.float64)
        torch.testing.assert_close(score / rows, torch.ones_like(rows), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("near", "stride"), [(16, 4), (32, 8)])
def test_estimated_lift_has_no_favourites_but_by_chance(even_llama, near, stride):
    """A score counts whole strides: near 1, and off by at most one stride's votes."""
    for position, score in stores_after_a_prompt(even_llama, "lift", near, stride):
        rows = torch.tensor([TOKENS - p for p in position], dtype=torch.float64)
        assert ((score / rows - 1).abs() <= stride / rows + 1e-5).all()
        assert rows.min() >= near


def test_the_last_rows_alone_hardly_favour_age(even_llama):
    """Raw sums over few rows: all tokens before them share one value."""
    for position, score in stores_after_a_prompt(even_llama, "raw", 32):
        early = score[torch.tensor(position) < TOKENS - 32]
        expected = torch.full_like(early, harmonic(TOKENS - 32, TOKENS))
        torch.testing.assert_close(early, expected, rtol=1e-5, atol=0)
