"""`kvcompress.attach` takes a storage, a recipe, a plan, a bundle, or a path of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kvcompress
from kvcompress import Budget, HeadPlan, Recipe, shape_of, uniform
from kvcompress.bundle.read import open_bundle
from kvcompress.errors import PlanError, RecipeError
from kvcompress.evict.scorers import Scorer, scorer
from kvcompress.evict.scorers.attention import LIFT, MEAN
from kvcompress.evict.scorers.base import PromptScorer
from kvcompress.plan import Plan
from kvcompress.registry import OWN
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.names import as_argument, cache_of
from kvcompress.runtime.static.triton_step import _vote
from kvcompress.runtime.step.cpu import Voting
from tests.runtime.models import build, prompts

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
WINDOW = """schema_version: 1
name: window
keep: {sink_tokens: 2, recent_tokens: 5, scorer: raw}
policy: {kind: uniform, head: {local: {tokens: 9}, k_dtype: int4}}
"""


def plan_on(model) -> Plan:
    found = attached(model)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("storage", ["model", "int8", "int4", "fp8"])
def test_a_storage_keeps_every_token_in_it(storage):
    model = kvcompress.attach(build("llama"), storage)
    head = HeadPlan(full=True, k_dtype=storage, v_dtype=storage)
    assert plan_on(model) == uniform(shape_of(model.config, model.dtype), head)
    out = model.generate(**prompts(1, 30), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 33)


def test_a_recipe_that_measures_nothing(tmp_path):
    (tmp_path / "window.yaml").write_text(WINDOW)
    model = build("llama")
    head = HeadPlan(local=Budget(tokens=9), k_dtype="int4")
    wanted = uniform(
        shape_of(model.config, model.dtype),
        head,
        sink_tokens=2,
        recent_tokens=5,
        scorer="raw",
        score_rows=Recipe.from_yaml(WINDOW).keep.score_rows,
        score_stride=Recipe.from_yaml(WINDOW).keep.score_stride,
        target="recipe window",
    )
    for given in (
        Recipe.from_yaml(WINDOW),
        tmp_path / "window.yaml",
        str(tmp_path / "window.yaml"),
    ):
        assert plan_on(kvcompress.attach(model, given)) == wanted
    (tmp_path / "plan.json").write_text(wanted.to_json())
    for given in (wanted, tmp_path / "plan.json"):
        assert plan_on(kvcompress.attach(model, given)) == wanted


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_attached_or_says_what_it_needs(path):
    # longer than what `streaming-relative` keeps
    model, recipe = build("llama", max_position_embeddings=4096), Recipe.load(path)
    try:
        plan = plan_on(kvcompress.attach(model, path))
    except PlanError as error:
        told = rf"attach: the recipe {recipe.name} .*; run kvcompress profile and kvcompress export"
        assert re.match(told, str(error))
        assert attached(model) is None
    else:
        assert {head for layer in plan.heads for head in layer} == {recipe.policy.head}
        for name in type(recipe.keep).model_fields:
            assert getattr(plan, name) == getattr(recipe.keep, name)


def test_some_recipes_are_attached():
    simple = []
    for path in RECIPES:
        try:
            kvcompress.attach(build("llama"), path)
        except PlanError:
            continue
        simple.append(path.stem)
    assert {"int8", "int4", "fp8", "sink-recent", "streaming", "h2o"} <= set(simple)


def test_a_bundle_gives_plan_and_constants(bundle: Path):
    found = open_bundle(bundle)
    for given in (found, bundle, str(bundle)):
        model, _ = kvcompress.load(bundle)
        kvcompress.detach(model)
        plan, params = attached(kvcompress.attach(model, given))
        assert plan == found.plan
        assert all(map(torch.equal, params.k_center, found.params.k_center))
    with pytest.raises(PlanError, match="a bundle brings its key constants"):
        kvcompress.attach(model, found, found.params)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("int5", PlanError, "int5 is no bundle, recipe .* none of the storages model, fp8, int8"),
        (8, PlanError, "a int says nothing that could be kept"),
        (None, PlanError, "a NoneType says nothing"),
        ("none.yaml", RecipeError, "none.yaml: cannot read"),
    ],
)
def test_anything_else_is_refused(given, error, words):
    model = build("llama")
    with pytest.raises(error, match=words):
        kvcompress.attach(model, given)
    assert attached(model) is None


# ---- scorers of the user's own
@pytest.fixture
def registered():
    before = dict(OWN)
    yield kvcompress.register_scorer
    OWN.clear()
    OWN.update(before)


class Longest(PromptScorer):
    def finish(self, score, tokens):
        return tokens.value.float().norm(dim=-1)


def test_a_scorer_of_the_users_own_ranks(registered):
    own = registered(Longest("longest"))
    assert registered(own) is own and scorer("longest") is own
    model = build("llama")
    recipe = Recipe.from_yaml(
        "schema_version: 1\nname: x\nkeep: {scorer: longest, sink_tokens: 0, recent_tokens: 4}\n"
        "policy: {kind: uniform, head: {frequent: {tokens: 6}, k_dtype: model, v_dtype: model}}\n"
    )
    kvcompress.attach(model, recipe)
    cache = kvcompress.new_cache(model)
    ids = prompts(1, 40)["input_ids"]
    with torch.no_grad():
        model(ids, **as_argument(cache))
        plain = build("llama")(ids, use_cache=True)
    full = cache_of(plain)
    state = cache.compressed_layers[0].state
    (group,) = state.groups
    for head in range(2):
        start = group.store.starts[0][head]
        kept = group.store.position[start : start + 6].sort().values
        longest = full.layers[0].values[0, head, :-4].float().norm(dim=-1).topk(6).indices
        assert torch.equal(kept.long(), longest.sort().values)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Longest("lift"), "there is another scorer 'lift'"),
        (Longest("longest"), "there is another scorer 'longest'"),
        (Longest("no name"), "'no name' is no name of letters"),
        (len, "a builtin_function_or_method is no kvcompress Scorer"),
    ],
)
def test_what_cannot_be_registered(own, words, registered):
    registered(Longest("longest"))
    with pytest.raises(PlanError, match=words):
        registered(own)


def test_a_plan_with_a_scorer_that_nobody_registered_says_how(registered):
    registered(Longest("longest"))
    text = uniform(shape_of(build("llama").config), HeadPlan(), scorer="longest").to_json()
    OWN.clear()
    with pytest.raises(PlanError, match="unknown scorer 'longest'.*kvcompress.register_scorer"):
        Plan.from_json(text)


HOOKS = ["row_weight", "collect", "merge", "initial", "arrive", "rank"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "known", [Scorer("own"), MEAN, LIFT, Longest("own")], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("on_the_class", [True, False])
def test_no_faster_form_runs_in_place_of_a_hook_that_was_changed(hook, known, on_the_class):
    """Everything that a step asks of a scorer, changed in a subclass or on the one scorer."""

    def changed(*args):
        raise AssertionError("called")

    kind = type(known)
    if on_the_class:
        own = type("Own", (kind,), {hook: changed})("own")
    else:
        own = kind("own")
        setattr(own, hook, changed)
    assert Voting.of(kind("own")) is not None and _vote(kind("own")) is not None
    assert Voting.of(own) is None
    honoured = hook == "initial"  # which a step on the GPU calls
    unused = hook == "row_weight" and not own.uses_attention  # nothing votes
    if not honoured and not unused:
        assert _vote(own) is None or not own.adds_up
