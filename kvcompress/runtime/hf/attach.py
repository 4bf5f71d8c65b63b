"""Putting a plan on a model, and taking it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import PreTrainedModel

from kvcompress.errors import PlanError, UnsupportedModelError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.hf import attention, generate
from kvcompress.runtime.hf.announce import announce, attention_modules, hand_over_input
from kvcompress.runtime.layer.relative import serving_rotations
from kvcompress.runtime.model.attached import (
    Attached,
    base_of,
    device_mesh,
    record,
    set_record,
    take_record,
)
from kvcompress.runtime.model.families import difference, refuse_what_cannot_generate, shape_of
from kvcompress.runtime.model.parallel import mesh_of, shard_params, shard_plan
from kvcompress.runtime.names import check_release

Model = TypeVar("Model")


def attach(model: Model, plan: Plan, params: KVParams | None = None) -> Model:
    """Let `generate` and forwards of a model use the compressed cache of `plan`.

    A cache of another kind that the caller passes is used as it is, and a forward with
    ``use_cache=False`` uses none. Attaching again replaces the plan.

    Args:
        model: of transformers, or wrapped by torch.compile or PEFT.

    Returns:
        The model that was given.

    Raises:
        UnsupportedModelError: if the model's attention cannot be served exactly.
        PlanError: if the plan was made for another architecture.
    """
    inner = base_of(model)
    check_release()
    check(inner)
    _check_plan(inner, plan)
    needs = scorer(plan.scorer).needs
    turns = plan.positions == "relative" or "rotation" in needs
    rotations = serving_rotations(inner, plan) if turns else None
    rank, size = mesh_of(inner, device_mesh)
    own = shard_plan(plan, rank, size), shard_params(params, rank, size)
    if record(inner) is not None:
        detach(inner)
    attention.register()
    before = inner.config._attn_implementation or "sdpa"
    made = Attached(type(inner), plan, params, before, attention.register)
    made.own, made.rotations = own, rotations
    generate.override(inner)
    inner.set_attn_implementation(attention.IMPLEMENTATION)
    made.hooks = [inner.register_forward_pre_hook(announce, with_kwargs=True)]
    if "hidden" in needs:
        made.hooks += [
            module.register_forward_pre_hook(hand_over_input, with_kwargs=True)
            for module in attention_modules(inner)
        ]
    set_record(inner, made)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`; the model is transformers' own again."""
    inner, found = take_record(model)
    if found is not None:
        for hook in found.hooks:
            hook.remove()
        generate.restore(inner)
        inner.set_attn_implementation(found.before)
    return model


@contextmanager
def attending_with(model: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Within the block, transformers' attention kernel of that name runs a model without a plan.

    Raises:
        UnsupportedModelError: where the model does not have it.
    """
    before = model.config._attn_implementation or "sdpa"
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        raise UnsupportedModelError(f"{type(model).__name__}: no {kernel} attention") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check(model: PreTrainedModel) -> None:
    """Refuse a model that the runtime would serve wrongly.

    Raises:
        UnsupportedModelError: naming the model and the reason.
    """
    shape_of(model.config)
    refuse_what_cannot_generate(model)
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention bypasses transformers' attention interface, so "
            "the compressed cache would never be read and the output would be wrong"
        )


def _check_plan(model: PreTrainedModel, plan: Plan) -> None:
    shape = shape_of(model.config, model.dtype)
    name = difference(plan.model, shape)
    if name is not None:
        raise PlanError(
            f"the plan is for another model: its {name} is {getattr(plan.model, name)}, this "
            f"model's is {getattr(shape, name)}; profile this model and plan again"
        )
