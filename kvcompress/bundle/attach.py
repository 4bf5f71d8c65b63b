"""`kvcompress.attach`: a plan, in whichever form the caller has it, put on a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from pydantic import ValidationError

from kvcompress.bundle.manifest import is_bundle
from kvcompress.bundle.read import Bundle, open_bundle
from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.head_plan import HeadPlan, KVDtype
from kvcompress.plan import Plan, explain, uniform
from kvcompress.recipe import Recipe, UniformPolicy
from kvcompress.runtime.hf import attach as hf
from kvcompress.runtime.model.attached import base_of
from kvcompress.runtime.model.families import shape_of

if TYPE_CHECKING:
    from kvcompress.plan import ModelShape
    from kvcompress.quant.keystats import KVParams

Model = TypeVar("Model")
Keeps = Plan | Bundle | Recipe | Path | str


def attach(model: Model, plan: Keeps, params: KVParams | None = None) -> Model:
    """Let `generate` and forwards of a model use the compressed cache.

    A cache of another kind that the caller passes is used as it is, and a forward with
    ``use_cache=False`` uses none. Attaching again replaces the plan; `detach` takes it away.

    Args:
        model: of transformers, or wrapped by torch.compile or PEFT.
        plan: a `Plan`; or a storage such as ``"int8"``, ``"rot4"`` or ``"model"``, in which every
            token is kept, ``"model"`` in the model's own dtype; or a `Recipe` with a uniform
            policy; or a `Bundle`, of which plan and key constants are taken and not the weights;
            or the path of a plan.json, recipe or bundle.
        params: key constants of a plan that was measured; a bundle brings its own.

    Returns:
        The model that was given.

    Raises:
        UnsupportedModelError: if the model's attention cannot be served exactly.
        PlanError: if the plan was made for another architecture; if a recipe needs measurements or
            a tokenizer, which a profile brings; if `plan` is nothing of the above.
        RecipeError, BundleError: for files that cannot be used.
    """
    if isinstance(plan, str) and plan in get_args(KVDtype):
        head = HeadPlan(full=True, k_dtype=plan, v_dtype=plan)  # type: ignore[arg-type]
        return hf.attach(model, uniform(_shape(model), head), params)
    if isinstance(plan, Path | str):
        plan = _read(Path(plan))
    if isinstance(plan, Bundle):
        if params is not None:
            raise PlanError("attach: a bundle brings its key constants; leave params out")
        return hf.attach(model, plan.plan, plan.params)
    if isinstance(plan, Recipe):
        plan = plan_of(plan, _shape(model))
    if not isinstance(plan, Plan):
        raise PlanError(
            f"attach: a {type(plan).__name__} says nothing that could be kept; give a Plan, Recipe "
            f"or Bundle, a path of one, or one of {', '.join(get_args(KVDtype))}"
        )
    return hf.attach(model, plan, params)


def plan_of(recipe: Recipe, shape: ModelShape) -> Plan:
    """The plan of a recipe that can be solved from the model's shape alone.

    Raises:
        PlanError: for every other recipe, saying what else it needs.
    """
    policy, keep = recipe.policy, recipe.keep
    needs: str | None = None
    if not isinstance(policy, UniformPolicy):
        needs = f"measures heads for its policy {policy.kind}"
    elif policy.head.special or policy.head.punct:
        needs = "keeps special tokens or punctuation, whose ids a tokenizer brings"
    elif scorer(keep.scorer).trained or "repeat" in scorer(keep.scorer).needs:
        needs = f"ranks by {keep.scorer}, which a profile prepares"
    elif recipe.weights != "bf16":
        needs = f"wants {recipe.weights} weights, which an export makes"
    if needs is not None or not isinstance(policy, UniformPolicy):
        raise PlanError(
            f"attach: the recipe {recipe.name} {needs}; run kvcompress profile and kvcompress "
            "export with it, then kvcompress.load"
        )
    settings: dict[str, object] = {name: getattr(keep, name) for name in type(keep).model_fields}
    try:
        return uniform(shape, policy.head, target=f"recipe {recipe.name}", **settings)
    except ValidationError as error:
        raise PlanError(f"attach: the recipe {recipe.name}: {explain(error)}") from None


def _shape(model: object) -> ModelShape:
    found = base_of(model)
    return shape_of(found.config, found.dtype)


def _read(path: Path) -> Plan | Bundle | Recipe:
    if is_bundle(path):
        return open_bundle(path)
    if path.suffix in (".yaml", ".yml"):
        return Recipe.load(path)
    if path.suffix == ".json":
        return Plan.load(path)
    raise PlanError(
        f"attach: {path} is no bundle, recipe (.yaml) or plan (.json), and none of the storages "
        f"{', '.join(get_args(KVDtype))}"
    )
