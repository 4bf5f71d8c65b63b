"""Plans of several sizes, run on calibration prompts: what a sum of losses costs in fact.

Losses are measured one head at a time and added up. When all heads change together, some changes
cancel, some add to one another, and KL grows faster than they do. How much differs from model to
model, and between text and questions about what stands far above. So the profiler solves plans at a
few sizes and runs each of them on prompts of both sorts, see `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from kvcompress.errors import PlanError
from kvcompress.plan import HeadPlan, Plan
from kvcompress.profile.assemble import assemble, plan_digest, reads_twice, summed_loss
from kvcompress.profile.kinds import Prompt
from kvcompress.profile.measure import Setup
from kvcompress.profile.replay import (
    Attention,
    full_attention,
    mean_kl,
    planned_attention,
    replay,
)
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile, TriedPlan
from kvcompress.recipe import BytesPolicy, Keep, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIED_PLAIN: Final = 4  # one prompt may cost twice what another does
TRIED_RECALLING: Final = 2
RATIOS: Final = (0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the bf16 bytes


def prompts_to_try(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of those that are plain text, and of those that ask for what stands far above."""
    recalling = [prompt for prompt in prompts if prompt.recalls]
    plain = [prompt for prompt in prompts if not prompt.recalls]
    return [*plain[:TRIED_PLAIN], *recalling[:TRIED_RECALLING]]


def try_plans(
    model: PreTrainedModel,
    setup: Setup,
    prompts: Sequence[Prompt],
    profile: Profile,
    step: Callable[[], None] = lambda: None,
) -> tuple[TriedPlan, ...]:
    """Every plan of `plans_to_try` with its KL on each sort of prompts.

    Args:
        prompts: those of `prompts_to_try`.
        profile: what it has tried already is not run again.
        step: told of every finished prompt.
    """
    plans = {_digest(plan): (name, plan) for name, plan in plans_to_try(profile)[::-1]}
    known = {plan.digest: (plan.nats, plan.recall_nats) for plan in profile.tried}
    new = [plan for digest, (_, plan) in plans.items() if digest not in known]
    if new:
        plain: list[torch.Tensor] = []
        recalling: list[torch.Tensor] = []
        for prompt in prompts:
            nats = _nats(model, setup, prompt.ids, new)
            (recalling if prompt.recalls else plain).append(nats)
            step()
        of_text, of_recall = _means(plain or recalling), _means(recalling)
        for number, plan in enumerate(new):
            known[_digest(plan)] = (of_text[number], of_recall[number] if of_recall else None)
    return tuple(
        TriedPlan(
            name=name,
            digest=digest,
            loss=_summed(profile, plan),
            nats=known[digest][0],
            recall_nats=known[digest][1],
        )
        for digest, (name, plan) in list(plans.items())[::-1]
    )


def _means(nats: list[torch.Tensor]) -> list[float]:
    """Over prompts, of each plan; empty without prompts."""
    if not nats:
        return []
    return [float(f"{max(0.0, mean):.6g}") for mean in torch.stack(nats).mean(0).tolist()]


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
            found.append(("the recipe's own", solve(profile, _by_ratio(profile.recipe.policy))))
        except PlanError:
            pass  # its target cannot be met, which whoever asks for the plan is told
    if "losses" not in profile.parts:
        return found
    for ratio in RATIOS:
        context = profile.provenance.prompt_tokens
        policy = BytesPolicy(kind="bytes", keep_ratio=ratio, context=context, budgets="ratio")
        try:
            found.append((f"{ratio:g} of the bytes", solve(profile, policy, keep)))
        except PlanError:
            break  # smaller ones do not fit either
    bare = ((HeadPlan(),) * profile.shape.kv_heads,) * profile.shape.layers
    found.append(("sinks and recent tokens", assemble(profile, keep, bare, "bare", None)))
    return found


def _by_ratio(policy: Policy) -> Policy:
    """`policy` whose plan keeps the same share of these prompts as of one of its own context."""
    grows = isinstance(policy, BytesPolicy) and policy.budgets == "from_context"
    return policy.model_copy(update={"budgets": "ratio"}) if grows else policy


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

    def predicted(attention: Attention) -> torch.Tensor:
        logits = replay(model, setup.shape, ids, layers, attention)
        return logits.float().log_softmax(-1)

    full = predicted(full_attention)
    found = []
    for plan in plans:
        attention = planned_attention(plan, keep_of(plan), setup.params, *classes)
        found.append(mean_kl(full, predicted(attention)))
    return torch.stack(found).cpu()
