"""From a profile to a plan, under each policy of a recipe. Nothing is measured again."""

from __future__ import annotations

from typing import Final

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import HeadPlan, Plan, WeightScheme
from kvcompress.profile.allocate import duo_heads, layers_heads, static_curve_heads
from kvcompress.profile.assemble import Heads, assemble, reads_twice, summed_loss
from kvcompress.profile.candidates import fastgen_ladder, keep_set
from kvcompress.profile.spending import spend_bytes
from kvcompress.profile.store import Profile
from kvcompress.recipe import (
    DuoPolicy,
    FastGenPolicy,
    Keep,
    LayersPolicy,
    Policy,
    Recipe,
    StaticCurvePolicy,
    UniformPolicy,
    reads_profile,
)

# the settings of `Keep` that change the numbers of a profile; the others say how a plan is used
MEASURED: Final = (
    "sink_tokens",
    "recent_tokens",
    "scorer",
    "score_rows",
    "score_stride",
    "pool_tokens",
)


def solve(
    profile: Profile,
    policy: Policy | None = None,
    keep: Keep | None = None,
    weights: WeightScheme | None = None,
) -> Plan:
    """The plan that `policy` asks for.

    Args:
        policy: None is the recipe's own.
        keep: None is the recipe's own. The settings that `MEASURED` lists change every number of
            the profile, so only a policy that reads no number may have others.
        weights: scheme whose bytes count against a memory target. None is the recipe's own; where
            that is bf16 and the profile measured formats per layer, the planner chooses.

    Raises:
        PlanError: if the profile does not have what the policy needs, or no plan meets its target.
    """
    policy = profile.recipe.policy if policy is None else policy
    keep = profile.recipe.keep if keep is None else keep
    other = _measured_otherwise(profile, keep)
    if other and reads_profile(policy):
        raise PlanError(f"the profile was measured with {other}; {_measure(profile)}")
    if reads_twice(keep) and not isinstance(policy, UniformPolicy):
        raise PlanError(
            f"the profile reads each prompt once and cannot rank by {keep.scorer}, which repeats "
            "it; use a uniform policy, or the scorer surrogate"
        )
    if isinstance(policy, UniformPolicy):
        heads: Heads = ((policy.head,) * profile.shape.kv_heads,) * profile.shape.layers
        target = f"uniform {policy.head.label} {policy.head.storage}"
    elif isinstance(policy, FastGenPolicy):
        heads = _first_hits(profile, policy)
        target = f"FastGen recovery {policy.recovery:g} by {policy.reading}"
    elif isinstance(policy, LayersPolicy):
        heads, target = layers_heads(profile, policy)
    elif isinstance(policy, StaticCurvePolicy):
        heads = static_curve_heads(profile, policy)
        target = f"{policy.ratio:g} of the tokens, by a curve per head over each {policy.scope}"
    elif isinstance(policy, DuoPolicy):
        heads = duo_heads(profile, policy)
        target = f"{policy.full_share:g} of the heads full, the others streaming"
    else:
        return spend_bytes(profile, policy, keep, weights)
    measured = not other and not reads_twice(keep)
    return assemble(profile, keep, heads, target, _loss(profile, heads) if measured else None)


def solve_recipe(
    profile: Profile,
    recipe: Recipe,
    policy: Policy | None = None,
    weights: WeightScheme | None = None,
) -> Plan:
    """The plan of another recipe than the profile's, if the profile measured all that it needs.

    Args:
        policy: in place of the recipe's.
        weights: as for `solve`.

    Raises:
        PlanError: as `solve`, and where the recipe names other calibration prompts or needs a
            trained scorer that the profile lacks; it says what to run.
    """
    policy = recipe.policy if policy is None else policy
    if recipe == profile.recipe:
        return solve(profile, policy, weights=weights)
    own = profile.recipe.model_copy(update={"weights": recipe.weights})
    try:
        _check_calibration(profile, recipe)
        _check_trained(profile, recipe.keep)
        return solve(profile.model_copy(update={"recipe": own}), policy, recipe.keep, weights)
    except PlanError as error:
        raise PlanError(f"recipe {recipe.name}: {error}") from None


def with_calibration_of(profile: Profile, recipe: Recipe) -> Recipe:
    """`recipe` with the calibration that the profile used in fact."""
    return recipe.model_copy(update={"calibration": profile.recipe.calibration})


def _check_calibration(profile: Profile, recipe: Recipe) -> None:
    """Refuse a recipe that asks for other calibration than the profile's; it may leave it open."""
    if "calibration" not in recipe.model_fields_set:
        return
    asked, used = recipe.calibration, profile.recipe.calibration
    names = asked.model_fields_set - {"data", "mix"}
    told = [(name, getattr(used, name), getattr(asked, name)) for name in sorted(names)]
    if names != asked.model_fields_set:
        told.insert(0, ("data", used.words(), asked.words()))
    wrong = [
        f"calibration.{name} {was}, the recipe says {now}" for name, was, now in told if was != now
    ]
    if wrong:
        raise PlanError(
            f"the profile was measured with {'; '.join(wrong)}; leave calibration out of the "
            f"recipe, or {_measure(profile)}"
        )


def _check_trained(profile: Profile, keep: Keep) -> None:
    if scorer(keep.scorer).trained and profile.surrogate_r2 is None:
        raise PlanError(
            f"the scorer {keep.scorer} is trained by the profiler, and this profile has not "
            f"trained it; {_measure(profile)}"
        )


def _measured_otherwise(profile: Profile, keep: Keep) -> str:
    """The settings of `keep` that differ from the profile's, in words; empty where none does."""
    own = profile.recipe.keep
    return "; ".join(
        f"keep.{name} {_shown(getattr(own, name))}, asked for is {_shown(getattr(keep, name))}"
        for name in MEASURED
        if getattr(own, name) != getattr(keep, name)
    )


def _measure(profile: Profile) -> str:
    return f"measure it: kvcompress profile {profile.model} -r RECIPE -o DIR"


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _loss(profile: Profile, heads: Heads) -> float | None:
    """Summed losses of a plan, None where it holds a head that the profile has not measured."""
    if "losses" not in profile.parts:
        return None
    return summed_loss(profile.settings[0], heads)


def _first_hits(profile: Profile, policy: FastGenPolicy) -> Heads:
    """FastGen: each head gets the first keep-set of the ladder that recovers enough, which is the
    cheapest."""
    profile.need("recovery", "FastGen")
    ladder = fastgen_ladder(policy)
    if [keep_set(h) for h in ladder] != [keep_set(h) for h in profile.chain]:
        raise PlanError(
            f"the profile measured FastGen with {_ratios(profile.chain)}, the policy asks for "
            f"{_ratios(ladder)}; ask for the profile's ratios, or {_measure(profile)}"
        )

    def enough(layer: int, head: int, column: int) -> bool:
        if ladder[column].full:
            return True
        if policy.reading == "l1":
            return profile.recovery_l1[layer][head][column] <= 1 - policy.recovery
        return profile.recovery[layer][head][column] >= policy.recovery

    columns = range(len(ladder))
    return tuple(
        tuple(
            next(ladder[c] for c in columns if enough(layer, head, c))
            for head in range(profile.shape.kv_heads)
        )
        for layer in range(profile.shape.layers)
    )


def _ratios(ladder: tuple[HeadPlan, ...]) -> str:
    head = ladder[-2]
    assert head.frequent and head.local
    return f"frequent_ratio {head.frequent.ratio:g} and local_ratio {head.local.ratio:g}"
