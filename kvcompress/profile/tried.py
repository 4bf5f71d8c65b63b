"""Plans of several sizes, run on calibration prompts: what a sum of losses costs in fact.

Losses are measured one head at a time and added up. When all heads change together, some changes
cancel, some add to one another, and KL grows faster than they do. How much differs from model to
model. So the profiler solves plans at a few sizes and runs each of them, see `replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from kvcompress.errors import PlanError
from kvcompress.plan import HeadPlan, Plan
from kvcompress.profile.assemble import assemble, plan_digest, reads_twice, summed_loss
from kvcompress.profile.measure import Setup
from kvcompress.profile.replay import full_attention, mean_kl, planned_attention, replay
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile, TriedPlan
from kvcompress.recipe import BytesPolicy, Keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED_PROMPTS: Final = 4
RATIOS: Final = (0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the bf16 bytes


def try_plans(
    model: PreTrainedModel,
    setup: Setup,
    prompts: list[list[int]],
    profile: Profile,
    step: Callable[[], None] = lambda: None,
) -> tuple[TriedPlan, ...]:
    """Every plan of `plans_to_try` with its KL, the mean over the first prompts.

    Args:
        step: told of every finished prompt.
    """
    plans = plans_to_try(profile)
    if not plans:
        return ()
    nats = torch.zeros(len(plans))
    chosen = prompts[:TRIED_PROMPTS]
    for ids in chosen:
        nats += _nats(model, setup, ids, [plan for _, plan in plans])
        step()
    means = (nats / len(chosen)).tolist()
    return tuple(
        TriedPlan(
            name=name,
            digest=plan_digest(keep_of(plan), plan.heads),
            loss=_summed(profile, plan),
            nats=float(f"{max(0.0, mean):.6g}"),
        )
        for (name, plan), mean in zip(plans, means, strict=True)
    )


def plans_to_try(profile: Profile) -> list[tuple[str, Plan]]:
    """The plan of the recipe's own policy and, with losses, byte plans from half to bare heads."""
    found: list[tuple[str, Plan]] = []
    if not _runs(profile.recipe.keep):
        return found
    try:
        found.append(("the recipe's own", solve(profile)))
    except PlanError:
        pass  # its target cannot be met, which whoever asks for the plan is told
    if "losses" not in profile.parts:
        return found
    keep = profile.recipe.keep
    for ratio in RATIOS:
        context = profile.provenance.prompt_tokens
        policy = BytesPolicy(kind="bytes", keep_ratio=ratio, context=context)
        try:
            found.append((f"{ratio:g} of the bytes", solve(profile, policy, keep)))
        except PlanError:
            break  # smaller ones do not fit either
    bare = ((HeadPlan(),) * profile.shape.kv_heads,) * profile.shape.layers
    found.append(("sinks and recent tokens", assemble(profile, keep, bare, "bare", None)))
    # the recipe's own may be one of these
    first = {plan_digest(keep_of(plan), plan.heads): (name, plan) for name, plan in found[::-1]}
    return list(first.values())[::-1]


def keep_of(plan: Plan) -> Keep:
    """The settings that every head of `plan` shares."""
    return Keep.model_validate({name: getattr(plan, name) for name in Keep.model_fields})


def _runs(keep: Keep) -> bool:
    """Whether `replay` does what the runtime would do with these settings."""
    plain = keep.positions == "original" and keep.per_request is None and keep.recall is None
    return plain and not reads_twice(keep)


def _summed(profile: Profile, plan: Plan) -> float | None:
    """Sum of the heads' losses by the setting of exact tokens that the plan has."""
    if "losses" not in profile.parts:
        return None
    for setting in profile.settings:
        if (setting.sink_tokens, setting.recent_tokens) == (plan.sink_tokens, plan.recent_tokens):
            return summed_loss(setting, plan.heads)
    return None


@torch.no_grad()
def _nats(model: PreTrainedModel, setup: Setup, ids: list[int], plans: list[Plan]) -> torch.Tensor:
    """KL of each plan on one prompt's held-out rows."""
    classes = setup.classes(torch.tensor(ids, device=model.device))
    layers = setup.collect(model, ids)
    full = replay(model, setup.shape, ids, layers, full_attention)
    found = []
    for plan in plans:
        attention = planned_attention(plan, keep_of(plan), setup.params, *classes)
        found.append(mean_kl(full, replay(model, setup.shape, ids, layers, attention)))
    return torch.stack(found).cpu()
