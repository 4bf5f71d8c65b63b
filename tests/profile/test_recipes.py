"""Every shipped recipe, solved from one profile: the plan of its own profile, or a refusal."""

from functools import cache
from pathlib import Path

import pytest

from kvcompress.errors import PlanError
from kvcompress.profile.run import run
from kvcompress.profile.solve import MEASURED, solve, solve_recipe
from kvcompress.recipe import PARTS, Calibration, Keep, Recipe, reads_profile
from tests.profile.conftest import model_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SHORT = Calibration(prompts=1, tokens=64)
RICH = Recipe(calibration=SHORT, keep=Keep(score_rows=None))


@pytest.fixture(scope="module")
def profiles(tiny_tokenizer, tmp_path_factory):
    """The profile of a recipe, taken once for all recipes whose measurements are the same."""
    model = model_of("llama")
    model.config.max_position_embeddings = 1024  # the contexts of the recipes

    @cache
    def taken(text):
        recipe = Recipe.from_yaml(text)
        out = tmp_path_factory.mktemp("p") / "p"
        return run(model, tiny_tokenizer, recipe, out, also=PARTS)

    def of(recipe):
        update = {"name": "own", "description": "", "calibration": SHORT}
        return taken(recipe.model_copy(update=update).to_yaml())

    return of


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_one_profile_gives_every_recipe_its_own_plan_or_says_what_it_lacks(profiles, path):
    recipe, rich = Recipe.load(path), profiles(RICH)
    try:
        plan = solve_recipe(rich, recipe)
    except PlanError as error:
        assert f"recipe {recipe.name}: " in str(error)
        assert f"kvcompress profile {rich.model} -r RECIPE -o DIR" in str(error)
        lacking = [
            f"keep.{name} {shown(RICH, name)}, asked for is {shown(recipe, name)}"
            for name in MEASURED
            if getattr(RICH.keep, name) != getattr(recipe.keep, name)
        ]
        trained = recipe.keep.scorer == "surrogate"
        assert trained or (reads_profile(recipe.policy) and lacking)
        assert trained or "; ".join(lacking) in str(error)
        assert not trained or "the scorer surrogate is trained by the profiler" in str(error)
        return
    own = solve(profiles(recipe), recipe.policy, recipe.keep)
    unknown = {"predicted_loss": None, "predicted_recall_loss": None}
    assert plan.model_copy(update=unknown) == own.model_copy(update=unknown)
    # the profile of the recipe itself has run the plan
    assert plan.predicted_loss is None or own.predicted_loss is not None


def test_what_a_recipe_says_of_calibration_must_be_what_was_measured(profiles):
    rich = profiles(RICH)
    policy = "policy: {kind: fastgen}\nkeep: {score_rows: null}\n"
    same = Recipe.from_yaml(policy + "calibration: {tokens: 64, prompts: 1}")
    assert solve_recipe(rich, same) == solve(rich)
    other = Recipe.from_yaml(policy + "calibration: {tokens: 256, seed: 7}")
    said = (
        "measured with calibration.seed 0, the recipe says 7; calibration.tokens 64, the recipe "
        "says 256; leave calibration out of the recipe"
    )
    with pytest.raises(PlanError, match=said):
        solve_recipe(rich, other)
    mixed = Recipe.from_yaml(policy + "calibration: {mix: {builtin: 0.5, my.txt: 0.5}}")
    said = r"calibration.data builtin, the recipe says 0.5 builtin \+ 0.5 my.txt; leave"
    with pytest.raises(PlanError, match=said):
        solve_recipe(rich, mixed)


def test_weights_of_a_recipe_count_against_its_memory_target(profiles):
    rich = profiles(RICH)
    text = "keep: {score_rows: null}\npolicy: {kind: bytes, memory: 1MiB}\nweights: int8\n"
    plan = solve_recipe(rich, Recipe.from_yaml(text))
    assert plan.weights == () and plan.target.endswith("int8 weights")
    planned = solve_recipe(rich, Recipe.from_yaml(text.replace("int8", "bf16")))
    assert len(planned.weights) == 2 and planned.target.endswith("planned weights")


def shown(recipe, name):
    value = getattr(recipe.keep, name)
    return "null" if value is None else str(value)
