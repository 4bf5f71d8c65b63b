"""Published ways to share a budget out over layers and heads: pure functions of a profile.

`layer_shares` needs no measurement. The calibrated shape, the static curve and the choice of full
heads read the losses that were measured with the recipe's own sinks and recent tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, KVDtype
from kvcompress.profile.assemble import Heads, bare_column
from kvcompress.profile.budget import Choice, spend
from kvcompress.profile.candidates import FREQUENT_RATIOS, LOCAL_SHARE
from kvcompress.profile.store import ExactSetting, Profile
from kvcompress.recipe import DuoPolicy, LayersPolicy, StaticCurvePolicy

BETAS: Final = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)  # tried both ways round by `calibrated`
_PARTS: Final = 1_000_000  # a row's tokens in parts, so that shares are whole numbers


def layer_shares(layers: int, beta: float) -> tuple[float, ...]:
    """Budget of each layer as a multiple of the mean, falling in a straight line; they sum to
    `layers`.

    Args:
        beta: the last layer gets 1/β of the mean and the first the rest, 2 − 1/β; 1 is flat. A
            negative β is the same from the last layer to the first, a funnel.

    Source: PyramidKV, arXiv 2406.02069, section 4.1 (β = 20); Scissorhands, arXiv 2305.17118,
    gives more to later layers.
    """
    if abs(beta) < 1:
        raise ValueError(f"beta {beta:g} is between -1 and 1: the last layer would get the most")
    if layers == 1:
        return (1.0,)
    last = 1 / abs(beta)
    first = 2 - last
    line = [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
    return tuple(line if beta > 0 else reversed(line))


def layer_tokens(total: int, layers: int, beta: float) -> tuple[int, ...]:
    """`total` tokens over the layers in the proportions of `layer_shares`; none is lost."""
    ends = [round(total * end / layers) for end in accumulate(layer_shares(layers, beta))]
    ends[-1] = total
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def within_one(ratios: Sequence[float]) -> tuple[float, ...]:
    """`ratios` cut at 1. The excess is spread evenly over the others, so that the mean stays."""
    found = list(ratios)
    if sum(found) >= len(found):
        return (1.0,) * len(found)
    while (excess := sum(max(0.0, ratio - 1) for ratio in found)) > 1e-12:
        found = [min(1.0, ratio) for ratio in found]
        open_ = [i for i, ratio in enumerate(found) if ratio < 1]
        for i in open_:
            found[i] += excess / len(open_)
    return tuple(min(1.0, ratio) for ratio in found)


def layers_heads(profile: Profile, policy: LayersPolicy) -> tuple[Heads, str]:
    """Heads with one budget for each layer, and a line that describes them, for `Plan.target`."""
    shape = profile.shape
    beta = {"flat": 1.0, "pyramid": policy.beta, "funnel": -policy.beta}.get(policy.shape)
    if beta is None:
        beta = calibrated_beta(profile, policy)
    if policy.tokens is not None:
        tokens = layer_tokens(policy.tokens * shape.layers, shape.layers, beta)
        budgets = [Budget(tokens=count) for count in tokens]
    else:
        assert policy.ratio is not None
        shares = [policy.ratio * share for share in layer_shares(shape.layers, beta)]
        budgets = [Budget(ratio=ratio) for ratio in within_one(shares)]
    stored = {"local": policy.local, "k_dtype": policy.k_dtype, "v_dtype": policy.v_dtype}
    heads = tuple(
        (HeadPlan(frequent=budget, **stored),) * shape.kv_heads  # type: ignore[arg-type]
        for budget in budgets
    )
    size = f"{policy.tokens} tokens" if policy.tokens is not None else f"{policy.ratio:g}"
    return heads, f"{policy.shape} over layers (beta {beta:g}), {size} for the mean head"


def calibrated_beta(profile: Profile, policy: LayersPolicy) -> float:
    """The shape with the smallest summed loss, read off the measured `frequent` curves."""
    profile.need("losses", "a calibrated shape over layers")
    shape, setting = profile.shape, profile.settings[0]
    mean = policy.ratio
    if mean is None:
        assert policy.tokens is not None
        mean = min(1.0, policy.tokens / profile.provenance.prompt_tokens)
    storage = (policy.k_dtype, policy.v_dtype)

    def loss(beta: float) -> float:
        ratios = within_one([mean * share for share in layer_shares(shape.layers, beta)])
        return sum(
            loss_at(setting, layer, head, ratio, storage)
            for layer, ratio in enumerate(ratios)
            for head in range(shape.kv_heads)
        )

    return min((sign * beta for beta in BETAS for sign in (1, -1)), key=loss)


def frequent_curve(
    setting: ExactSetting, storage: tuple[KVDtype, KVDtype]
) -> list[tuple[float, int, HeadPlan]]:
    """(share of a row's tokens, column, head), rising from bare to full, in one storage.

    Raises:
        PlanError: if the storage was not measured.
    """
    bare = bare_column(setting)
    found = [(0.0, bare, setting.candidates[bare])]
    for column, head in enumerate(setting.candidates):
        if (head.k_dtype, head.v_dtype) != storage or head.special or head.punct:
            continue
        if head.full:
            found.append((1.0, column, head))
        elif head.frequent and head.local and head.frequent.ratio in FREQUENT_RATIOS:
            share = head.frequent.ratio * (1 + LOCAL_SHARE)
            if head.local.ratio == head.frequent.ratio * LOCAL_SHARE:
                found.append((share, column, head))
    if len(found) < 3:
        raise PlanError(
            f"storage {'/'.join(storage)} was not measured for this model; choose k_dtype and "
            "v_dtype as in the dtypes of a byte policy"
        )
    return sorted(found, key=lambda entry: entry[0])


def loss_at(
    setting: ExactSetting,
    layer: int,
    head: int,
    ratio: float,
    storage: tuple[KVDtype, KVDtype],
) -> float:
    """Loss of a head that keeps `ratio` of the tokens, between the measured ones in a straight
    line."""
    curve = frequent_curve(setting, storage)
    losses = [setting.losses[layer][head][column] for _, column, _ in curve]
    return float(np.interp(ratio, [share for share, _, _ in curve], losses))


def static_curve_heads(profile: Profile, policy: StaticCurvePolicy) -> Heads:
    """Shares of a token budget for which the heads' losses add up to the least.

    Heads compete within their layer or over the whole model. Every head gets at least `floor` of
    the mean, as in AdaKV (arXiv 2407.11550, section 4). Differs from the paper: AdaKV pools the
    scores of one request; here the losses of the profile decide once for all requests.
    """
    profile.need("losses", "a static curve")
    shape, setting = profile.shape, profile.settings[0]
    curve = frequent_curve(setting, (policy.k_dtype, policy.v_dtype))
    floor = policy.floor * policy.ratio
    open_ = [entry for entry in curve if entry[0] >= floor] or curve[-1:]
    if open_[0][0] > policy.ratio:  # no measured share lies between floor and mean
        open_ = [max((e for e in curve if e[0] <= policy.ratio), key=lambda e: e[0]), *open_]
    rows = [
        [
            [
                Choice(math.ceil(_PARTS * share), losses[column], place)
                for place, (share, column, _) in enumerate(open_)
            ]
            for losses in layer
        ]
        for layer in setting.losses
    ]
    pools = [[head for row in rows for head in row]] if policy.scope == "model" else rows
    budget = [math.ceil(_PARTS * policy.ratio) * len(pool) for pool in pools]
    taken = [c for pool, size in zip(pools, budget, strict=True) for c in spend(pool, size)]
    picked = [open_[choice.column][2] for choice in taken]
    heads = shape.kv_heads
    return tuple(tuple(picked[i : i + heads]) for i in range(0, len(picked), heads))


def duo_heads(profile: Profile, policy: DuoPolicy) -> Heads:
    """Heads that lose most when they stream stay full, the others stream.

    A streaming head keeps sinks and recent tokens alone.

    Source: DuoAttention, arXiv 2410.10819. Differs from the paper: no gate is trained; the profile
    has measured what each head loses. ``ranked_by: repetition`` takes KVzip's scores of heads
    (arXiv 2505.23416) instead, which need no training either.

    Raises:
        PlanError: for a ranking that the profile does not have.
    """
    shape, setting = profile.shape, profile.settings[0]
    if policy.ranked_by == "repetition":
        profile.need("heads", "duo, ranked by repetition,")
        if not profile.repeat_heads:
            raise PlanError(
                "the prompts are too short for scores of heads by repetition; profile "
                "again with longer ones"
            )
        need = profile.repeat_heads
    else:
        profile.need("losses", "duo")
        column = bare_column(setting)
        need = tuple(tuple(head[column] for head in layer) for layer in setting.losses)
    places = [(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]
    count = round(policy.full_share * len(places))
    order = sorted(places, key=lambda place: -need[place[0]][place[1]])
    stored = {"k_dtype": policy.k_dtype, "v_dtype": policy.v_dtype}
    full = HeadPlan(full=True, **stored)  # type: ignore[arg-type]
    streaming = HeadPlan(local=policy.local, **stored)  # type: ignore[arg-type]
    chosen = set(order[:count])
    return tuple(
        tuple(full if (layer, head) in chosen else streaming for head in range(shape.kv_heads))
        for layer in range(shape.layers)
    )
