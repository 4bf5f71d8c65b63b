"""From a profile to a plan, under each policy of a recipe. Nothing is measured again."""

from __future__ import annotations

from typing import Any

from kvcompress.accounting import FLAG_BYTES, head_plan_bytes, kv_bytes, prefill_bytes
from kvcompress.errors import PlanError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import HeadPlan, Plan, uniform
from kvcompress.profile.budget import Choice, minimum_bytes, spend
from kvcompress.profile.candidates import codes_nothing, fastgen_chain, keep_set
from kvcompress.profile.predict import Heads, expected, summed_loss
from kvcompress.profile.store import Profile
from kvcompress.recipe import (
    BytesPolicy,
    FastGenPolicy,
    Keep,
    Policy,
    UniformPolicy,
    WeightScheme,
    parse_bytes,
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
        keep: None is the recipe's own. Another scorer, sinks or recent tokens change every number
            of the profile, so only a uniform policy, which needs none of them, may have another.
        weights: scheme whose bytes count against a memory target; None is the recipe's own.

    Raises:
        PlanError: if the profile does not have what the policy needs, or no plan meets its target.
    """
    policy = profile.recipe.policy if policy is None else policy
    keep = profile.recipe.keep if keep is None else keep
    if keep != profile.recipe.keep and not isinstance(policy, UniformPolicy):
        raise PlanError(
            f"the profile was measured with {profile.recipe.keep}, the plan asks for {keep}; "
            "profile again with these settings"
        )
    if _reads_twice(keep) and not isinstance(policy, UniformPolicy):
        raise PlanError(
            f"the profile reads each prompt once and cannot rank by {keep.scorer}, which repeats it; "
            "use a uniform policy, or the scorer surrogate"
        )
    if isinstance(policy, UniformPolicy):
        heads: Heads = ((policy.head,) * profile.shape.kv_heads,) * profile.shape.layers
        target = f"uniform {policy.head.label} {policy.head.storage}"
    elif isinstance(policy, FastGenPolicy):
        heads = _first_hits(profile, policy)
        target = f"FastGen recovery {policy.recovery:g} by {policy.reading}"
    else:
        return _spend_bytes(profile, policy, keep, weights or profile.recipe.weights)
    measured = keep == profile.recipe.keep and not _reads_twice(keep)
    return _plan(profile, keep, heads, target, _loss(profile, heads) if measured else None)


def _reads_twice(keep: Keep) -> bool:
    """Whether the scorer's votes are those of a repetition, which the profile does not make."""
    return "repeat" in scorer(keep.scorer).needs


def _plan(
    profile: Profile, keep: Keep, heads: Heads, target: str, predicted_loss: float | None
) -> Plan:
    return Plan(
        model=profile.shape,
        heads=heads,
        target=target,
        predicted_loss=predicted_loss,
        **_settings(profile, keep),
    )


def _settings(profile: Profile, keep: Keep) -> dict[str, Any]:
    return {
        "sink_tokens": keep.sink_tokens,
        "recent_tokens": keep.recent_tokens,
        "scorer": keep.scorer,
        "score_rows": keep.score_rows,
        "pool_tokens": keep.pool_tokens,
        "per_request": keep.per_request,
        "positions": keep.positions,
        "turn_tokens": keep.turn_tokens,
        "recall": keep.recall,
        "special_ids": profile.special_ids,
        "punct_ids": profile.punct_ids,
        "repeat_ids": profile.repeat_ids if _reads_twice(keep) else (),
        "special_share": profile.special_share,
        "punct_share": profile.punct_share,
        "tokenizer_hash": profile.tokenizer_hash,
        "max_position": profile.shape.max_position,
    }


def _loss(profile: Profile, heads: Heads) -> float | None:
    """Predicted loss of a plan, None where it holds a head that the profile has not measured."""
    loss = summed_loss(profile, heads)
    return None if loss is None else expected(profile, loss)


def _first_hits(profile: Profile, policy: FastGenPolicy) -> Heads:
    """FastGen: the first keep-set of the chain that recovers enough; it is the cheapest."""
    chain = fastgen_chain(policy)
    if [keep_set(h) for h in chain] != [keep_set(h) for h in profile.chain]:
        raise PlanError(
            f"the profile measured FastGen with {_ratios(profile.chain)}, the policy asks for "
            f"{_ratios(chain)}; profile again with that recipe, or ask for the profile's ratios"
        )

    def enough(layer: int, head: int, column: int) -> bool:
        if chain[column].full:
            return True
        if policy.reading == "l1":
            return profile.recovery_l1[layer][head][column] <= 1 - policy.recovery
        return profile.recovery[layer][head][column] >= policy.recovery

    columns = range(len(chain))
    return tuple(
        tuple(
            next(chain[c] for c in columns if enough(layer, head, c))
            for head in range(profile.shape.kv_heads)
        )
        for layer in range(profile.shape.layers)
    )


def _ratios(chain: tuple[HeadPlan, ...]) -> str:
    head = chain[-2]
    assert head.frequent and head.local
    return f"frequent_ratio {head.frequent.ratio:g} and local_ratio {head.local.ratio:g}"


def _spend_bytes(profile: Profile, policy: BytesPolicy, keep: Keep, weights: WeightScheme) -> Plan:
    shape, context, batch = profile.shape, policy.context, policy.batch
    if context > shape.max_position:
        raise PlanError(
            f"context {context} is beyond the {shape.max_position} positions of the model; "
            "give a shorter context"
        )
    empty = uniform(shape, HeadPlan(), **_settings(profile, keep))
    allowed = _allowed(profile, policy)
    choices = []
    for layer in range(shape.layers):
        sizes = {
            c: head_plan_bytes(empty, layer, profile.candidates[c], context, batch) for c in allowed
        }
        for row in profile.losses[layer]:
            choices.append([Choice(sizes[c], row[c], c) for c in allowed])
    # what heads share, with class flags in every layer: which layers need them is not known yet
    shared = kv_bytes(empty, context, batch) - sum(
        head_plan_bytes(empty, layer, HeadPlan(), context, batch) * shape.kv_heads
        for layer in range(shape.layers)
    )
    exact = (keep.sink_tokens + keep.recent_tokens) * FLAG_BYTES
    shared += batch * shape.layers * exact
    target, fixed, wish = _target(profile, policy, weights)
    room = target - fixed - shared
    least = minimum_bytes(choices)
    if room < least:
        raise PlanError(
            f"{wish}: {target} bytes are {least - room} too few; the smallest plan needs "
            f"{fixed + shared + least} ({_explain(fixed, shared + least)}); raise the target, or "
            "lower context or batch"
        )
    picked = [profile.candidates[c.column] for c in spend(choices, room)]
    rows = [picked[i : i + shape.kv_heads] for i in range(0, len(picked), shape.kv_heads)]
    heads = tuple(map(tuple, rows))
    return _plan(profile, keep, heads, wish, _loss(profile, heads))


def _allowed(profile: Profile, policy: BytesPolicy) -> list[int]:
    """Columns that the policy may choose, storage by storage."""
    known = {(h.k_dtype, h.v_dtype) for h in profile.candidates if not codes_nothing(h)}
    missing = [pair for pair in policy.dtypes if pair not in known]
    if missing:
        names = ", ".join("/".join(pair) for pair in sorted(known))
        raise PlanError(
            f"dtypes {'/'.join(missing[0])} were not measured for this model; choose among {names}"
        )
    return [
        column
        for column, head in enumerate(profile.candidates)
        if codes_nothing(head) or (head.k_dtype, head.v_dtype) in policy.dtypes
    ]


def _target(profile: Profile, policy: BytesPolicy, weights: WeightScheme) -> tuple[int, int, str]:
    """(target bytes, bytes of it that are not KV cache, what was asked for)."""
    shape, context, batch = profile.shape, policy.context, policy.batch
    at = f"at {context} tokens, batch {batch}"
    if policy.memory is not None:
        fixed = profile.weight_bytes[weights] + prefill_bytes(shape, context, batch)
        return parse_bytes(policy.memory), fixed, f"{policy.memory} in all {at}, {weights} weights"
    assert policy.keep_ratio is not None
    target = int(policy.keep_ratio * shape.bf16_kv_bytes(context, batch))
    return target, 0, f"{policy.keep_ratio:g} of the bf16 KV bytes {at}"


def _explain(fixed: int, kv: int) -> str:
    return f"{fixed} for weights and prefill, {kv} for the KV cache" if fixed else "KV cache alone"
