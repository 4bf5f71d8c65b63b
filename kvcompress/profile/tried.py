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
        profile: what it has tried already is not run again.
        step: told of every finished prompt.
    """
    plans = {_digest(plan): (name, plan) for name, plan in plans_to_try(profile)[::-1]}
    known = {plan.digest: plan.nats for plan in profile.tried}
    new = [plan for digest, (_, plan) in plans.items() if digest not in known]
    if new:
        chosen = prompts[:TRIED_PROMPTS]
        nats = torch.zeros(len(new))
        for ids in chosen:
            nats += _nats(model, setup, ids, new)
            step()
        means = (nats / len(chosen)).tolist()
        known |= {_digest(p): float(f"{max(0.0, x):.6g}") for p, x in zip(new, means, strict=True)}
    return tuple(
        TriedPlan(name=name, digest=digest, loss=_summed(profile, plan), nats=known[digest])
        for digest, (name, plan) in list(plans.items())[::-1]
    )


def plans_to_try(profile: Profile) -> list[tuple[str, Plan]]:
    """The plan of the recipe's own policy, where `replay` does what the runtime would do with it,
    and with losses byte plans from half of the bytes to bare heads.

    The latter are the same for settings that say how a plan is used: losses are measured without.
    """
    found: list[tuple[str, Plan]] = []
    own = profile.recipe.keep
    keep = own.model_copy(update={"positions": "original", "per_request": None, "recall": None})
    if reads_twice(keep):
        return found
    if own == keep:
        try:
            found.append(("the recipe's own", solve(profile)))
        except PlanError:
            pass  # its target cannot be met, which whoever asks for the plan is told
    if "losses" not in profile.parts:
        return found
    for ratio in RATIOS:
        context = profile.provenance.prompt_tokens
        policy = BytesPolicy(kind="bytes", keep_ratio=ratio, context=context)
        try:
            found.append((f"{ratio:g} of the bytes", solve(profile, policy, keep)))
        except PlanError:
            break  # smaller ones do not fit either
    bare = ((HeadPlan(),) * profile.shape.kv_heads,) * profile.shape.layers
    found.append(("sinks and recent tokens", assemble(profile, keep, bare, "bare", None)))
    return found


def keep_of(plan: Plan) -> Keep:
    """The settings that every head of `plan` shares."""
    return Keep.model_validate({name: getattr(plan, name) for name in Keep.model_fields})


def _digest(plan: Plan) -> str:
    return plan_digest(keep_of(plan), plan.heads)


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
