"""The byte policy: one budget spent on tokens and bits of every head, and on weights.

Each head's candidates are (bytes, loss) points; so are each decoder layer's weight formats, where
the profile measured them. `budget.spend` buys where a byte saves most loss. `spend_bytes` tries
every measured setting of sinks and recent tokens, with every weight format that a bundle may mix
with 16 bits, and takes the plan with the smallest predicted loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcompress.accounting import FLAG_BYTES, head_plan_bytes, kv_bytes, prefill_bytes
from kvcompress.errors import PlanError
from kvcompress.plan import ROUNDED, WHOLE, Budget, HeadPlan, Plan, WeightScheme, uniform
from kvcompress.profile.assemble import assemble, settings, summed_nats
from kvcompress.profile.budget import Choice, minimum_bytes, spend
from kvcompress.profile.candidates import codes_nothing, fits
from kvcompress.profile.store import ExactSetting, Profile
from kvcompress.recipe import BytesPolicy, Keep, parse_bytes


@dataclass(frozen=True)
class _Offer:
    """The choices that one setting of exact tokens and weight formats leaves to the planner.

    Attributes:
        heads: candidates, by column.
        schemes: weight formats, by column; empty where all weights have one format.
        choices: one list per head, in layers' order, then, with `schemes`, one per decoder layer.
        head_count: lists of `choices` that belong to heads.
        fixed_bytes: bytes of weights that are not chosen, and of one uncompressed layer at prefill.
        shared_bytes: bytes of the KV cache that do not depend on what the heads choose.
    """

    keep: Keep
    heads: dict[int, HeadPlan]
    schemes: tuple[WeightScheme, ...]
    choices: list[list[Choice]]
    head_count: int
    fixed_bytes: int
    shared_bytes: int

    @property
    def least_bytes(self) -> int:
        return self.fixed_bytes + self.shared_bytes + minimum_bytes(self.choices)


def spend_bytes(
    profile: Profile, policy: BytesPolicy, keep: Keep, weights: WeightScheme | None
) -> Plan:
    """See the module docstring.

    Args:
        weights: format of all weights; None lets the planner choose per layer, where the profile
            measured them and the target counts them.

    Raises:
        PlanError: if the target cannot be met, with the bytes that are missing.
    """
    _check_context(profile, policy, keep)
    profile.need("losses", "a byte target")
    if policy.memory is not None and _open_weights(profile, weights):
        profile.need("weights", "a memory target")
    target, wish = _target(profile, policy, weights)
    best: tuple[float, int, _Offer, list[Choice]] | None = None
    least: _Offer | None = None
    for number, offer in enumerate(_offers(profile, policy, keep, weights)):
        if least is None or offer.least_bytes < least.least_bytes:
            least = offer
        if offer.least_bytes > target:
            continue
        taken = _spend(offer, target - offer.fixed_bytes - offer.shared_bytes)
        loss = float(sum(choice.loss for choice in taken))
        if best is None or (loss, number) < best[:2]:
            best = (loss, number, offer, taken)
    if best is None:
        assert least is not None
        raise PlanError(
            f"{wish}: {target} bytes are {least.least_bytes - target} too few; the smallest plan "
            f"needs {least.least_bytes} ({_explain(least)}); raise the target, or lower context "
            "or batch"
        )
    loss, _, offer, taken = best
    shape = profile.shape
    count = offer.head_count
    picked = [offer.heads[choice.column] for choice in taken[:count]]
    rows = [tuple(picked[i : i + shape.kv_heads]) for i in range(0, count, shape.kv_heads)]
    formats = tuple(offer.schemes[choice.column] for choice in taken[count:])
    plan = assemble(profile, offer.keep, tuple(rows), wish, loss, weights=formats)
    if policy.budgets != "from_context" or keep.positions == "relative":
        return plan
    heads = tuple(tuple(at_least(head, policy.context) for head in row) for row in plan.heads)
    return plan.model_copy(update={"heads": heads})


def _spend(offer: _Offer, room_bytes: int) -> list[Choice]:
    """The best of several plans: over all candidates, each storage alone, full heads alone.

    Greedy steps come near the best plan but may miss it. The narrower tries make sure that choosing
    tokens and bits together is never worse than choosing either alone.
    """
    pairs = {(h.k_dtype, h.v_dtype) for h in offer.heads.values() if not codes_nothing(h)}
    parts = [set(offer.heads), {c for c, h in offer.heads.items() if h.full}]
    for pair in sorted(pairs):
        stored = {c for c, h in offer.heads.items() if (h.k_dtype, h.v_dtype) == pair}
        parts.append(stored | {c for c, h in offer.heads.items() if codes_nothing(h)})
    found = []
    for part in parts:
        heads = [
            [c for c in head if c.column in part] for head in offer.choices[: offer.head_count]
        ]
        choices = [*heads, *offer.choices[offer.head_count :]]
        if all(choices) and minimum_bytes(choices) <= room_bytes:
            found.append(spend(choices, room_bytes))
    return min(found, key=lambda taken: sum(choice.loss for choice in taken))


def _check_context(profile: Profile, policy: BytesPolicy, keep: Keep) -> None:
    limit = profile.shape.max_position
    if policy.context > limit and keep.positions == "original":
        raise PlanError(
            f"context {policy.context} is beyond the {limit} positions of the model; give a "
            "shorter context, or a recipe with keep.positions: relative"
        )


def _offers(
    profile: Profile, policy: BytesPolicy, keep: Keep, weights: WeightScheme | None
) -> Iterator[_Offer]:
    """One offer per setting of exact tokens and weight formats, the recipe's own first."""
    own, *fewer = profile.settings
    _check_storage(own, policy, profile.shape.head_dim)
    formats = _mixed_formats(profile, policy, weights)
    for setting in (own, *(fewer if policy.fewer_exact else ())):
        exact = {"sink_tokens": setting.sink_tokens, "recent_tokens": setting.recent_tokens}
        own_keep = keep.model_copy(update=exact)
        heads = _heads(profile, policy, own_keep, setting)
        if not heads:
            continue
        choices, shared = _head_choices(profile, policy, own_keep, setting, heads)
        scheme = weights or profile.recipe.weights
        fixed = 0
        if policy.memory is not None:
            fixed = prefill_bytes(profile.shape, policy.context, policy.batch)
        if not formats:
            whole = profile.weight_bytes[scheme] if policy.memory is not None else 0
            yield _Offer(own_keep, heads, (), choices, len(choices), fixed + whole, shared)
        for mixed in formats:
            layers = _weight_choices(profile, mixed)
            rest = profile.weight_bytes["bf16"]
            rest -= sum(layer.size_bytes["bf16"] for layer in profile.weight_layers)
            every = [*choices, *layers]
            yield _Offer(own_keep, heads, mixed, every, len(choices), fixed + rest, shared)


def _open_weights(profile: Profile, weights: WeightScheme | None) -> bool:
    """Whether the planner is free to choose the weights' formats."""
    return weights is None and profile.recipe.weights == "bf16"


def _mixed_formats(
    profile: Profile, policy: BytesPolicy, weights: WeightScheme | None
) -> list[tuple[WeightScheme, ...]]:
    """Sets of formats that the layers of one bundle may have; empty where there is no choice.

    transformers loads one bitsandbytes format per model, so 16 bits mix with int8 or with nf4, but
    int8 not with nf4. Each format alone is offered too, because greedy steps as large as a layer
    can miss it.
    """
    if policy.memory is None or not _open_weights(profile, weights) or not profile.weight_layers:
        return []
    allowed = policy.weight_schemes
    mixed: list[tuple[WeightScheme, ...]] = [(WHOLE, scheme) for scheme in ROUNDED]
    alone: list[tuple[WeightScheme, ...]] = [(scheme,) for scheme in (WHOLE, *ROUNDED)]
    return [schemes for schemes in (*mixed, *alone) if {*schemes} <= {*allowed}]


def _weight_choices(profile: Profile, schemes: tuple[WeightScheme, ...]) -> list[list[Choice]]:
    return [
        [
            Choice(layer.size_bytes[scheme], summed_nats(profile, layer.nats[scheme]), column)
            for column, scheme in enumerate(schemes)
        ]
        for layer in profile.weight_layers
    ]


def _heads(
    profile: Profile, policy: BytesPolicy, keep: Keep, setting: ExactSetting
) -> dict[int, HeadPlan]:
    """The candidates that the policy allows, by their column in the profile."""
    found = {}
    for column, head in enumerate(setting.candidates):
        bare = codes_nothing(head)
        if not bare and (head.k_dtype, head.v_dtype) not in policy.dtypes:
            continue
        if policy.keep_sets == "full" and not head.full:
            continue
        if policy.keep_sets == "local" and (head.frequent or head.special or head.punct):
            continue
        if keep.positions == "relative":
            length = min(policy.context, profile.provenance.prompt_tokens)
            head = in_tokens(head, length)
            if not _bounded(head, keep, profile.shape.max_position):
                continue
        elif policy.budgets == "tokens":
            head = in_tokens(head, policy.context)
        found[column] = head
    return found


def in_tokens(head: HeadPlan, length: int) -> HeadPlan:
    """`head` with the budgets that a prompt of `length` tokens has, whatever the prompt."""
    tokens = {
        name: Budget(tokens=budget.resolve(length))
        for name in ("frequent", "local")
        if (budget := getattr(head, name)) is not None
    }
    return head.model_copy(update=tokens)


def at_least(head: HeadPlan, length: int) -> HeadPlan:
    """`head` with budgets that a prompt below `length` tokens has as if it had so many."""
    grown = {
        name: budget.model_copy(update={"min_tokens": budget.resolve(length)})
        for name in ("frequent", "local")
        if (budget := getattr(head, name)) is not None and budget.ratio is not None
    }
    return head.model_copy(update=grown)


def _bounded(head: HeadPlan, keep: Keep, max_position: int) -> bool:
    """Whether the tokens of a head, numbered from 0, stay within the trained positions."""
    if head.full or head.special or head.punct:
        return False
    budgets = [budget for budget in (head.frequent, head.local) if budget is not None]
    most = sum(budget.resolve(0) for budget in budgets) + keep.sink_tokens
    return most + 2 * keep.recent_tokens <= max_position


def _head_choices(
    profile: Profile,
    policy: BytesPolicy,
    keep: Keep,
    setting: ExactSetting,
    heads: dict[int, HeadPlan],
) -> tuple[list[list[Choice]], int]:
    """(choices of every head, bytes that the heads share)."""
    shape, context, batch = profile.shape, policy.context, policy.batch
    empty = uniform(shape, HeadPlan(), **settings(profile, keep))
    choices = []
    for layer in range(shape.layers):
        sizes = {c: head_plan_bytes(empty, layer, h, context, batch) for c, h in heads.items()}
        for row in setting.losses[layer]:
            choices.append([Choice(sizes[c], row[c], c) for c in heads])
    # Class flags are counted in every layer, because no head has been chosen yet.
    shared = kv_bytes(empty, context, batch) - sum(
        head_plan_bytes(empty, layer, HeadPlan(), context, batch) * shape.kv_heads
        for layer in range(shape.layers)
    )
    exact = (keep.sink_tokens + keep.recent_tokens) * FLAG_BYTES
    return choices, shared + batch * shape.layers * exact


def _check_storage(own: ExactSetting, policy: BytesPolicy, head_dim: int) -> None:
    """Codes that this width of heads cannot have are left out, where others are allowed."""
    known = {(h.k_dtype, h.v_dtype) for h in own.candidates if not codes_nothing(h)}
    absent = [pair for pair in policy.dtypes if pair not in known]
    missing = [pair for pair in absent if all(fits(dtype, head_dim) for dtype in pair)]
    if missing or len(absent) == len(policy.dtypes):
        missing = missing or absent
        names = ", ".join("/".join(pair) for pair in sorted(known))
        raise PlanError(
            f"dtypes {'/'.join(missing[0])} were not measured for this model; choose among {names}"
        )


def _target(profile: Profile, policy: BytesPolicy, weights: WeightScheme | None) -> tuple[int, str]:
    """(target bytes, what was asked for)."""
    at = f"at {policy.context} tokens, batch {policy.batch}"
    if policy.memory is not None:
        chosen = _mixed_formats(profile, policy, weights)
        what = "planned" if chosen else weights or profile.recipe.weights
        return parse_bytes(policy.memory), f"{policy.memory} in all {at}, {what} weights"
    assert policy.keep_ratio is not None
    target = int(policy.keep_ratio * profile.shape.bf16_kv_bytes(policy.context, policy.batch))
    return target, f"{policy.keep_ratio:g} of the bf16 KV bytes {at}"


def _explain(offer: _Offer) -> str:
    if not offer.fixed_bytes:
        return "KV cache alone"
    weights = minimum_bytes(offer.choices[offer.head_count :])
    return (
        f"{offer.fixed_bytes + weights} for weights and prefill, "
        f"{offer.least_bytes - offer.fixed_bytes - weights} for the KV cache"
    )
