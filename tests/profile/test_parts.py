"""A profile has the parts that were asked for, and gets more without measuring twice."""

import json

import pytest
import torch

from kvcompress.errors import PlanError
from kvcompress.plan import HeadPlan
from kvcompress.profile import parts as profiler
from kvcompress.profile import tried
from kvcompress.profile.kinds import Prompt
from kvcompress.profile.run import run
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile
from kvcompress.recipe import (
    PARTS,
    BytesPolicy,
    Calibration,
    DuoPolicy,
    FastGenPolicy,
    Keep,
    LayersPolicy,
    Recipe,
    StaticCurvePolicy,
    UniformPolicy,
)

BYTES = BytesPolicy(kind="bytes", keep_ratio=0.2, context=256)
MEMORY = BytesPolicy(kind="bytes", memory="1GiB", context=256)
READ = [
    (UniformPolicy(kind="uniform", head=HeadPlan(full=True)), set()),
    (FastGenPolicy(kind="fastgen"), {"recovery"}),
    (BYTES, {"losses"}),
    (MEMORY, {"losses", "weights"}),
    (StaticCurvePolicy(kind="static_curve", ratio=0.3), {"losses"}),
    (LayersPolicy(kind="layers", shape="calibrated", ratio=0.3), {"losses"}),
    (LayersPolicy(kind="layers", shape="pyramid", ratio=0.3), set()),
    (DuoPolicy(kind="duo", full_share=0.5), {"losses"}),
    (DuoPolicy(kind="duo", full_share=0.5, ranked_by="repetition"), {"heads"}),
]
SMALL = Calibration(prompts=2, tokens=256)


def recipe_of(policy):
    return Recipe(calibration=SMALL, policy=policy)


@pytest.mark.parametrize(("policy", "parts"), READ, ids=lambda value: getattr(value, "kind", ""))
def test_a_policy_is_solved_from_the_parts_that_it_reads(
    policy, parts, llama, tiny_tokenizer, tmp_path
):
    assert recipe_of(policy).parts == parts
    profile = run(llama, tiny_tokenizer, recipe_of(policy), tmp_path / "p")
    assert set(profile.parts) == parts
    plan = solve(profile)
    if not plan.weights:  # it was run, so its loss was measured
        assert plan.predicted_loss is not None


def test_every_kind_of_policy_is_here():
    kinds = {type(policy) for policy, _ in READ}
    assert kinds == {
        UniformPolicy,
        FastGenPolicy,
        BytesPolicy,
        StaticCurvePolicy,
        LayersPolicy,
        DuoPolicy,
    }


def test_weights_of_one_format_are_not_measured():
    assert Recipe(policy=MEMORY, weights="int8").parts == {"losses"}


@pytest.fixture(scope="module")
def begun(llama, tiny_tokenizer, tmp_path_factory):
    """A profile with one part after the other, and how often each kind of work was done."""
    out = tmp_path_factory.mktemp("parts") / "p"
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("measure_prompt", "key_moments", "measure_weights", "head_scores"):
            original = getattr(profiler, name)

            def counted(*args, original=original, name=name, **kwargs):
                counts[-1][name] = counts[-1].get(name, 0) + 1
                return original(*args, **kwargs)

            patch.setattr(profiler, name, counted)
        ran = tried._nats

        def running(model, setup, ids, plans):
            counts[-1]["tried"] = counts[-1].get("tried", 0) + len(plans)
            return ran(model, setup, ids, plans)

        patch.setattr(tried, "_nats", running)
        profiles = []
        for also in ([], ["recovery"], ["heads", "weights"], ["weights"]):
            counts.append({})
            profiles.append(run(llama, tiny_tokenizer, recipe_of(BYTES), out, also=also))
    return out, profiles, counts


def test_a_part_is_added_without_measuring_the_others_again(begun):
    out, profiles, counts = begun
    assert [set(p.parts) for p in profiles] == [
        {"losses"},
        {"losses", "recovery"},
        set(PARTS),
        set(PARTS),
    ]
    plans = len(profiles[0].tried)
    assert counts == [
        {"key_moments": 2, "measure_prompt": 2, "tried": 2 * plans},
        {"measure_prompt": 2},
        {"measure_weights": 1, "head_scores": 1},
        {},
    ]
    first, *_, last = profiles
    assert last == Profile.load(out)
    for name in ("losses", "candidates", "fewer", "loss_unit", "params_sha256", "tried"):
        assert getattr(first, name) == getattr(last, name)


def test_parts_in_any_order_give_the_same(begun, llama, tiny_tokenizer, tmp_path):
    at_once = run(llama, tiny_tokenizer, recipe_of(BYTES), tmp_path / "p", also=PARTS)
    assert at_once == begun[1][-1]


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        (MEMORY, "weights"),
        (FastGenPolicy(kind="fastgen"), "recovery"),
        (DuoPolicy(kind="duo", full_share=0.5, ranked_by="repetition"), "heads"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_plan_that_needs_more_names_the_command_that_adds_it(begun, policy, part):
    only = begun[1][0]
    with pytest.raises(PlanError, match=f"kvcompress profile .* --also {part} -o DIR"):
        solve(only, policy)
    assert solve(begun[1][-1], policy).heads


def test_losses_are_asked_for_by_whoever_reads_them(begun):
    bare = begun[1][-1].model_copy(update={"parts": ("recovery",)})
    for policy, parts in READ:
        if "losses" in parts:
            with pytest.raises(PlanError, match="--also losses"):
                solve(bare, policy)


def test_profiles_of_older_versions_are_read(begun, tmp_path):
    """They had every part, and the KL on the way to bare heads in place of tried plans."""
    profile = begun[1][-1]
    data = json.loads(profile.model_dump_json())
    for name in ("parts", "tried"):
        del data[name]
    data |= {"schema_version": 2, "path_nats": [0.1, 0.2, 0.3, 0.4, 0.5]}
    (tmp_path / "profile.json").write_text(json.dumps(data))
    old = Profile.load(tmp_path)
    assert old.parts == PARTS and [plan.nats for plan in old.tried] == [0.1, 0.2, 0.3, 0.4, 0.5]
    bare = profile.candidates.index(HeadPlan())
    whole = sum(row[bare] for layer in profile.losses for row in layer)
    assert old.tried[0].loss == pytest.approx(whole / 8)
    assert solve(old, BYTES).heads


def test_plans_of_several_sizes_are_tried(begun):
    profile = begun[1][0]
    names = [plan.name for plan in profile.tried]
    assert names[0] == "the recipe's own" and names[-1] == "sinks and recent tokens"
    sizes = [plan for plan in profile.tried if plan.name.endswith("of the bytes")]
    assert len(sizes) >= 2 and all(plan.loss is not None for plan in profile.tried)
    assert solve(profile).predicted_loss == profile.tried[0].nats
    plans = tried.plans_to_try(profile)
    assert len(names) == len(plans)
    # what is granted to shorter prompts is not granted to the prompts that plans are tried on
    assert least_tokens(plans[0][1]) == {0} and 0 not in least_tokens(solve(profile))


def least_tokens(plan):
    budgets = [b for row in plan.heads for head in row for b in (head.frequent, head.local)]
    return {budget.min_tokens for budget in budgets if budget is not None}


@pytest.mark.parametrize(
    ("kinds", "nats", "recall_nats"),
    [
        (("facts", "text", "chat", "own", "text", "chat", "quote", "code"), 8 / 3, 1.0),
        (("facts", "chat"), 0.5, 0.5),
        (("own", "text"), 0.5, None),
    ],
)
def test_each_sort_of_prompt_has_a_mean_of_its_own(begun, monkeypatch, kinds, nats, recall_nats):
    """Prompts that cost 0, 1, 2 … nats: the first four of plain text and the first two others."""
    monkeypatch.setattr(
        tried, "_nats", lambda model, setup, ids, plans: torch.tensor([float(ids[0])] * len(plans))
    )
    prompts = [Prompt([number], kind) for number, kind in enumerate(kinds)]
    chosen = tried.prompts_to_try(prompts)
    new = begun[1][0].model_copy(update={"tried": ()})
    steps = []
    found = tried.try_plans(None, None, chosen, new, lambda: steps.append(1))
    want = (mean_of(nats), recall_nats if recall_nats is None else mean_of(recall_nats))
    assert {(plan.nats, plan.recall_nats) for plan in found} == {want}
    assert len(steps) == len(chosen) == min(len(kinds), 5)


def mean_of(nats):
    return float(f"{nats:.6g}")


def test_losses_that_come_to_a_profile_later_try_only_what_is_new(llama, tiny_tokenizer, tmp_path):
    """FastGen's own plan was run before, without the losses that its entry then gets."""
    recipe = recipe_of(FastGenPolicy(kind="fastgen"))
    first = run(llama, tiny_tokenizer, recipe, tmp_path / "p")
    assert [plan.name for plan in first.tried] == ["the recipe's own"]
    later = run(llama, tiny_tokenizer, recipe, tmp_path / "p", also=["losses"])
    own = next(plan for plan in later.tried if plan.name == "the recipe's own")
    assert own.nats == first.tried[0].nats and len(later.tried) > 2
    assert first.tried[0].loss is None and own.loss is not None


def test_positions_in_the_cache_are_predicted_by_plans_at_their_own_positions(
    llama, tiny_tokenizer, tmp_path
):
    """`replay` numbers nothing anew, so the recipe's own plan is not said to have been run."""
    keep = Keep(positions="relative")
    relative = Recipe(calibration=SMALL, keep=keep, policy=BYTES)
    profile = run(llama, tiny_tokenizer, relative, tmp_path / "p")
    assert profile.tried and "the recipe's own" not in {plan.name for plan in profile.tried}
    predicted = solve(profile).predicted_loss
    assert predicted is not None and predicted not in {plan.nats for plan in profile.tried}
    whole = run(llama, tiny_tokenizer, recipe_of(BYTES), tmp_path / "q")
    curve = {plan.digest: plan.nats for plan in whole.tried}
    assert all(curve[plan.digest] == plan.nats for plan in profile.tried)
