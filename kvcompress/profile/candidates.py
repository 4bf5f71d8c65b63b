"""Everything that a planner may give a head: keep-sets in each storage, and which holds which."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvcompress.evict import keep_set_ladder
from kvcompress.plan import Budget, HeadPlan, KVDtype
from kvcompress.recipe import BytesPolicy, FastGenPolicy, Keep, Recipe, UniformPolicy
from kvcompress.storage import PAIRS, STORAGES

STORAGE: Final[tuple[tuple[KVDtype, KVDtype], ...]] = (("model", "model"), *PAIRS)
# measured for full heads and for `frequent` without classes alone, which published shapes ask for
RARE: Final[tuple[tuple[KVDtype, KVDtype], ...]] = (
    ("int8", "int4"),
    ("int4", "int4"),
    ("fp8", "fp8"),
)
ALONE: Final[tuple[KVDtype, ...]] = ("int8", "rot4", "rot3", "rot2")  # of keys or values alone
LOCAL_RATIOS: Final = (0.9, 0.75, 0.5, 0.25, 0.125, 0.0625, 0.03, 0.015)
FREQUENT_RATIOS: Final = (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625, 0.03, 0.015)
ALONE_RATIOS: Final = (0.25, 0.125, 0.0625, 0.03, 0.015)  # `frequent` without `local`
CLASS_RATIOS: Final = (0.5, 0.25, 0.125, 0.0625, 0.03)  # beside special tokens and punctuation
LOCAL_SHARE: Final = 0.25  # of a frequent budget, beside it
# fewer sinks and recent tokens than a recipe asks for: in small budgets, uncoded tokens cost most
FEWER_EXACT: Final = ((4, 4), (1, 2))


def fastgen_ladder(policy: FastGenPolicy) -> tuple[HeadPlan, ...]:
    """The keep-sets of `keep_set_ladder` with the ratios and storage of the policy."""
    frequent, local = Budget(ratio=policy.frequent_ratio), Budget(ratio=policy.local_ratio)
    return keep_set_ladder.fastgen_ladder(frequent, local, policy.k_dtype, policy.v_dtype)


def fastgen_policy(recipe: Recipe) -> FastGenPolicy:
    """The recipe's policy, or the paper's ratios where the recipe has another policy."""
    policy = recipe.policy
    return policy if isinstance(policy, FastGenPolicy) else FastGenPolicy(kind="fastgen")


def candidates(recipe: Recipe, head_dim: int) -> tuple[HeadPlan, ...]:
    """Everything that the profile measures for each head, without repeats."""
    keep_sets = _plain_sets(FREQUENT_RATIOS)
    keep_sets += [_frequent(ratio, classes=True) for ratio in CLASS_RATIOS]
    keep_sets += fastgen_ladder(fastgen_policy(recipe))
    found = [HeadPlan()]
    for keep_set in keep_sets:
        found += [with_storage(keep_set, *pair) for pair in (*STORAGE, *_asked(recipe))]
    rare = [HeadPlan(full=True), *(_frequent(r, classes=False) for r in FREQUENT_RATIOS)]
    for pair in RARE:
        found += [with_storage(head, *pair) for head in rare]
    for code in ALONE:
        found += [with_storage(HeadPlan(full=True), code, "model")]
        found += [with_storage(HeadPlan(full=True), "model", code)]
    if isinstance(recipe.policy, UniformPolicy):
        found.append(recipe.policy.head)
    return _that_fit(found, head_dim)


def small_candidates(recipe: Recipe, head_dim: int) -> tuple[HeadPlan, ...]:
    """Candidates that are measured with `FEWER_EXACT` tokens: coded keep-sets without classes."""
    sets, pairs = _plain_sets(FREQUENT_RATIOS[2:]), (*PAIRS, *_asked(recipe))
    found = [with_storage(keep_set, *pair) for keep_set in sets for pair in pairs]
    return _that_fit([HeadPlan(), *found], head_dim)


def _asked(recipe: Recipe) -> tuple[tuple[KVDtype, KVDtype], ...]:
    """The pairs of codes that a byte plan may choose from, whichever they are."""
    return recipe.policy.dtypes if isinstance(recipe.policy, BytesPolicy) else ()


def fewer_exact(keep: Keep) -> tuple[Keep, ...]:
    """Settings with fewer sinks and recent tokens than `keep`, the most tokens first."""
    found = []
    for sinks, recent in FEWER_EXACT:
        smaller = {
            "sink_tokens": min(sinks, keep.sink_tokens),
            "recent_tokens": min(recent, keep.recent_tokens),
        }
        found.append(keep.model_copy(update=smaller))
    return tuple(other for other in dict.fromkeys(found) if other != keep)


def _plain_sets(frequent_ratios: tuple[float, ...]) -> list[HeadPlan]:
    """Keep-sets without classes."""
    sets = [HeadPlan(full=True)]
    sets += [HeadPlan(local=Budget(ratio=ratio)) for ratio in LOCAL_RATIOS]
    sets += [HeadPlan(frequent=Budget(ratio=ratio)) for ratio in ALONE_RATIOS]
    return sets + [_frequent(ratio, classes=False) for ratio in frequent_ratios]


def _frequent(ratio: float, classes: bool) -> HeadPlan:
    return HeadPlan(
        special=classes,
        punct=classes,
        frequent=Budget(ratio=ratio),
        local=Budget(ratio=ratio * LOCAL_SHARE),
    )


def fits(dtype: KVDtype, head_dim: int) -> bool:
    """Whether the codes of so many channels fill whole bytes."""
    return head_dim % STORAGES[dtype].multiple == 0


def _that_fit(heads: list[HeadPlan], head_dim: int) -> tuple[HeadPlan, ...]:
    """Without repeats."""
    kinds = {kind for kind in STORAGES if fits(kind, head_dim)}
    return tuple(dict.fromkeys(h for h in heads if {h.k_dtype, h.v_dtype} <= kinds))


def with_storage(head: HeadPlan, k_dtype: KVDtype, v_dtype: KVDtype) -> HeadPlan:
    return head.model_copy(update={"k_dtype": k_dtype, "v_dtype": v_dtype})


def keep_set(head: HeadPlan) -> HeadPlan:
    """`head` without its storage, to compare keep-sets by."""
    return with_storage(head, "model", "model")


def codes_nothing(head: HeadPlan) -> bool:
    """Whether the head holds sinks and recent tokens alone, so that its storage does not matter."""
    return not (head.full or head.special or head.punct or head.frequent or head.local)


def within(small: HeadPlan, large: HeadPlan) -> bool:
    """Whether `large` keeps every token of `small`, each in at least as many bits."""
    if codes_nothing(small):
        return True
    bits = _holds(small.k_dtype, large.k_dtype) and _holds(small.v_dtype, large.v_dtype)
    if large.full or small.full:
        return bits and large.full
    return (
        bits
        and small.special <= large.special
        and small.punct <= large.punct
        and _budget_within(small.frequent, large.frequent)
        and _budget_within(small.local, large.local)
    )


def _holds(small: KVDtype, large: KVDtype) -> bool:
    return STORAGES[large].holds(STORAGES[small])


def _budget_within(small: Budget | None, large: Budget | None) -> bool:
    """Conservative: budgets in different units, or with different bounds, are not compared."""
    if small is None or small == large:
        return True
    if large is None:
        return False
    if small.tokens is not None and large.tokens is not None:
        return small.tokens <= large.tokens
    if small.ratio is not None and large.ratio is not None:
        bounds = small.min_tokens <= large.min_tokens and small.max_tokens == large.max_tokens
        return bounds and small.ratio <= large.ratio
    return False


def lower_envelope(losses: Tensor, heads: tuple[HeadPlan, ...]) -> Tensor:
    """`losses` ``[..., C]`` where no candidate is worse than one that it holds.

    Measured losses nearly follow that order, but noise breaks it: rounding may happen to cancel the
    change that dropping tokens made. The smaller candidate always fits in the larger one's room.
    """
    order = torch.tensor([[within(small, large) for small in heads] for large in heads])
    held = losses.unsqueeze(-2).expand(*losses.shape[:-1], len(heads), len(heads))
    return held.masked_fill(~order, torch.inf).amin(-1)
