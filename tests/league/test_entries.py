"""Roles, storage and twins."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress.errors import RecipeError
from kvcompress.league.entries import choose, make_entries, read_recipes, role_of, stored_in
from kvcompress.plan import Budget, HeadPlan
from kvcompress.recipe import BytesPolicy, FastGenPolicy, Recipe, UniformPolicy

RECIPES = Path(__file__).parents[2] / "recipes"


def uniform(name: str, **head: object) -> Recipe:
    return Recipe(name=name, policy=UniformPolicy(kind="uniform", head=HeadPlan(**head)))  # type: ignore[arg-type]


def planned(name: str, ratio: float) -> Recipe:
    return Recipe(name=name, policy=BytesPolicy(kind="bytes", keep_ratio=ratio))


def test_every_shipped_recipe_has_a_role_or_a_reason():
    recipes = read_recipes(RECIPES)
    entries, skipped = make_entries(recipes)
    twins = {name for entry in entries for name in entry.same_as}
    known = {entry.name for entry in entries} | twins | {each.name for each in skipped}
    assert {recipe.name for recipe in recipes} <= known
    roles = {entry.name: entry.role for entry in entries}
    assert roles["full cache"] == "reference" and entries[0].recipe is None
    assert {roles[name] for name in ("sink-recent", "random", "key-norm")} == {"baseline"}
    assert {roles[name] for name in ("int8", "int4", "k8v4", "fp8")} == {"quantization"}
    assert roles["h2o"] == roles["fastgen"] == "published"


def test_recipes_that_differ_in_the_byte_target_alone_are_one_entry():
    entries, _ = make_entries([planned("eighth", 0.125), planned("quarter", 0.25)])
    (ours,) = (entry for entry in entries if entry.role == "planned")
    assert ours.name == "planned" and ours.same_as == ("eighth", "quarter")
    parts = [entry for entry in entries if entry.role == "part"]
    assert [part.name for part in parts] == ["planned tokens-only", "planned bits-only"]
    assert [part.bits_only for part in parts] == [False, True]
    assert parts[0].recipe is not None and isinstance(parts[0].recipe.policy, BytesPolicy)
    assert parts[0].recipe.policy.dtypes == (("int8", "int8"),)


def test_a_recipe_that_differs_in_the_weights_alone_is_left_out():
    recipes = [
        uniform("all", full=True).model_copy(update={"weights": "nf4"}),
        uniform("both", full=True),
    ]
    entries, skipped = make_entries(recipes)
    assert [entry.name for entry in entries] == ["full cache", "both"]
    assert [(each.name, each.reason) for each in skipped] == [
        ("all", "the league compares KV caches; that of this recipe is both's")
    ]


def test_storage_takes_the_place_of_16_bits_alone():
    half = Budget(ratio=0.5)
    evictor = uniform("h2o", frequent=half, k_dtype="model", v_dtype="int4")
    head = stored_in(evictor, "int8").policy.head  # type: ignore[union-attr]
    assert (head.k_dtype, head.v_dtype) == ("int8", "int4")
    fastgen = Recipe(policy=FastGenPolicy(kind="fastgen", k_dtype="model", v_dtype="model"))
    assert stored_in(fastgen, "int4").policy.k_dtype == "int4"  # type: ignore[union-attr]
    assert stored_in(evictor, "recipe") == evictor


def test_codes_and_planners_keep_their_storage():
    entries, _ = make_entries([uniform("full16", full=True, k_dtype="model", v_dtype="model")])
    recipe = entries[1].recipe
    assert recipe is not None and recipe.policy.head.k_dtype == "model"  # type: ignore[union-attr]
    assert role_of(planned("p", 0.5)) == "planned"


def test_only_takes_names_roles_and_twins():
    entries, _ = make_entries(
        [planned("eighth", 0.1), planned("quarter", 0.2), uniform("h2o", frequent=Budget(tokens=4))]
    )
    assert [e.name for e in choose(entries, ["quarter"])] == ["full cache", "planned"]
    assert [e.name for e in choose(entries, ["published"])] == ["full cache", "h2o"]
    assert choose(entries, []) == entries
    with pytest.raises(RecipeError, match=r"--only h3o: no such entry; choose from eighth, "):
        choose(entries, ["h3o"])


def test_every_bad_recipe_is_named_at_once(tmp_path):
    with pytest.raises(RecipeError, match=r"no \*\.yaml in it"):
        read_recipes(tmp_path)
    (tmp_path / "a.yaml").write_text("nonsense: 1\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("[", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"a\.yaml: nonsense: unknown key.*; .*b\.yaml: not YAML"):
        read_recipes(tmp_path)
