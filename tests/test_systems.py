"""The recipes of published systems: plans for the demo model with the papers' settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcompress.accounting import kv_bytes
from kvcompress.evict.scorers import scorer
from kvcompress.plan import FastGenChoice, ModelShape, Plan, PooledBudget, Threshold, uniform
from kvcompress.recipe import Recipe, UniformPolicy
from kvcompress.registry import SCORERS

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: Recipe.load(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}
UNIFORM = sorted(name for name, r in RECIPES.items() if isinstance(r.policy, UniformPolicy))
DEMO = ModelShape(
    model_type="llama",
    config_hash="0" * 64,
    layers=4,
    query_heads=8,
    kv_heads=4,
    head_dim=64,
    sliding_windows=(None,) * 4,
    max_position=1024,
)
POOLED = PooledBudget(kind="pooled", scope="layer", floor=0.2)
# (scorer, score_rows, pool_tokens, recent_tokens, per_request) as the papers have them
SETTINGS = {
    "h2o": ("raw", None, 1, 16, None),
    "h2o-mean": ("mean", None, 1, 16, None),
    "h2o-lift": ("lift", None, 1, 16, None),
    "value-aware": ("value", None, 1, 16, None),
    "scissorhands": ("vote", 400, 1, 10, None),
    "corm": ("corm", 64, 1, 16, Threshold(kind="threshold", at_least=-63.0)),
    "tova": ("tova", 1, 1, 1, None),
    "snapkv": ("mean", 32, 7, 32, None),
    "adakv": ("mean", 32, 7, 32, POOLED),
    "criticalkv": ("critical", 32, 7, 32, POOLED),
    "expected-attention": ("expected", None, 1, 16, None),
    "keydiff": ("key_diff", None, 1, 16, None),
    "key-norm": ("key_norm", None, 1, 16, None),
    "random": ("random", None, 1, 16, None),
    "random-keep-prompt": ("random_generated", None, 1, 16, None),
    "fastgen-request": (
        "lift", None, 1, 16, FastGenChoice(kind="fastgen", recovery=0.95, reading="mass")
    ),
}  # fmt: skip


def plan_of(recipe: Recipe) -> Plan:
    assert isinstance(recipe.policy, UniformPolicy)
    settings = recipe.keep.model_dump(exclude={"per_request"})
    return uniform(DEMO, recipe.policy.head, per_request=recipe.keep.per_request, **settings)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_are_the_papers(name):
    keep = RECIPES[name].keep
    found = (
        keep.scorer, keep.score_rows, keep.pool_tokens, keep.recent_tokens, keep.per_request
    )  # fmt: skip
    assert found == SETTINGS[name]
    assert keep.sink_tokens == (0 if name == "tova" else 4)


@pytest.mark.parametrize("name", UNIFORM)
def test_a_uniform_recipe_is_a_plan_for_the_demo_model(name):
    plan = plan_of(RECIPES[name])
    assert scorer(plan.scorer).name == plan.scorer
    assert Plan.from_json(plan.to_json()) == plan
    whole = DEMO.bf16_kv_bytes(1024, 1)
    head = plan.heads[0][0]
    if name in SETTINGS and name not in ("random-keep-prompt", "fastgen-request", "corm"):
        assert kv_bytes(plan, 1024, 1) <= 0.35 * whole
    else:
        assert kv_bytes(plan, 1024, 1) <= 1.2 * whole or head.full


def test_corms_threshold_is_its_window():
    for name, recipe in RECIPES.items():
        rule = recipe.keep.per_request
        if recipe.keep.scorer == "corm":
            assert isinstance(rule, Threshold), name
            assert recipe.keep.score_rows == 1 - rule.at_least


def test_the_page_of_systems_names_recipes_and_scorers_that_exist():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    named = set(re.findall(r"recipes/([a-z0-9.-]+)\.yaml", page))
    assert named <= set(RECIPES)
    assert named >= set(SETTINGS)
    for scorer_name in re.findall(r"scorer `(\w+)`", page):
        assert scorer_name in SCORERS
    for path in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / path).is_file(), path
