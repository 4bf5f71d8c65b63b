"""Sizes: the rules by which entries shrink, and the search for what fits a byte target."""

from __future__ import annotations

import pytest

from kvcompress.accounting import kv_bytes
from kvcompress.errors import PlanError
from kvcompress.league.entries import Entry
from kvcompress.league.requests import request_dial
from kvcompress.league.scale import exact_tokens, has_budgets, in_tokens, keeps_all, scaled
from kvcompress.league.tune import TOLERANCE, Bench, dial_of, largest, place
from kvcompress.plan import Budget, FastGenChoice, HeadPlan, ModelShape, Plan, Threshold, uniform
from kvcompress.recipe import (
    BytesPolicy,
    DuoPolicy,
    FastGenPolicy,
    Keep,
    LayersPolicy,
    Recipe,
    StaticCurvePolicy,
    UniformPolicy,
)

SHAPE = ModelShape(
    model_type="llama",
    config_hash="x",
    layers=4,
    query_heads=8,
    kv_heads=4,
    head_dim=64,
    sliding_windows=(None,) * 4,
    max_position=1024,
)
LENGTH = 960
POINTS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 40)


def solve(recipe: Recipe) -> Plan:
    """A uniform recipe's plan; a byte policy keeps its ratio of the prompt, all in int8."""
    policy = recipe.policy
    head = HeadPlan(full=True)
    if isinstance(policy, UniformPolicy):
        head = policy.head
    elif isinstance(policy, BytesPolicy) and policy.keep_ratio is not None:
        if policy.keep_ratio < 0.01:
            raise PlanError("too few")
        head = HeadPlan(frequent=Budget(ratio=policy.keep_ratio))
    keep = recipe.keep
    return uniform(
        SHAPE,
        head,
        sink_tokens=keep.sink_tokens,
        recent_tokens=keep.recent_tokens,
        per_request=keep.per_request,
        punct_share=0.1 if head.punct else 0.0,
    )


def bench(measure=lambda plan, length: kv_bytes(plan, length, 1)) -> Bench:
    return Bench(SHAPE, solve, solve, measure)


def entry(role="published", keep: Keep | None = None, **head) -> Entry:
    policy = UniformPolicy(kind="uniform", head=HeadPlan(**head))
    recipe = Recipe(name="e", policy=policy, keep=keep or Keep())
    return Entry(name="e", role=role, description="", recipe=recipe)


def target(point: float) -> float:
    return point * SHAPE.bf16_kv_bytes(LENGTH, 1)


# ---- the rule for sinks and recent tokens
@pytest.mark.parametrize(
    ("wanted", "share", "expected"),
    [
        ((4, 16), 1 / 8, (4, 16)),  # 40 allowed
        ((4, 16), 1 / 16, (4, 16)),  # 20 allowed, just enough
        ((4, 16), 1 / 40, (2, 6)),  # 8 allowed: a quarter of them sinks
        ((4, 64), 1 / 8, (4, 36)),
        ((0, 64), 1 / 40, (0, 8)),  # no sink where the recipe has none
        ((4, 16), 1 / 960, (1, 1)),  # never without a recent token
        ((4, 1), 1 / 240, (1, 1)),
    ],
)
def test_exact_tokens_get_a_third_of_the_bytes(wanted, share, expected):
    assert exact_tokens(*wanted, share, LENGTH) == expected


# ---- scaling
def test_ratios_become_tokens_of_the_length():
    head = HeadPlan(frequent=Budget(ratio=0.1), local=Budget(ratio=0.05, max_tokens=20))
    (first, *_), *_ = in_tokens(uniform(SHAPE, head), 1000).heads
    assert (first.frequent, first.local) == (Budget(tokens=100), Budget(tokens=20))


def test_all_budgets_and_caps_take_one_factor_and_round_down():
    head = HeadPlan(frequent=Budget(tokens=10), local=Budget(tokens=5), special=True, cap=21)
    plan = scaled(uniform(SHAPE, head), 0.5)
    assert all(
        (h.frequent, h.local, h.cap) == (Budget(tokens=5), Budget(tokens=2), 10)
        for row in plan.heads
        for h in row
    )
    large = scaled(uniform(SHAPE, head), 100.0, most_tokens=300)
    assert large.heads[0][0].frequent == Budget(tokens=300)


def test_extra_tokens_go_to_the_first_layers_once_per_head():
    head = HeadPlan(frequent=Budget(tokens=10), local=Budget(tokens=5))
    plan = scaled(uniform(SHAPE, head), 1.0, extra_layers=1)
    assert plan.heads[0][3].frequent == Budget(tokens=11)
    assert plan.heads[0][3].local == Budget(tokens=5)
    assert plan.heads[1][0].frequent == Budget(tokens=10)
    assert has_budgets(plan) and not keeps_all(plan)
    assert keeps_all(uniform(SHAPE, HeadPlan(full=True)))


def test_the_largest_that_fits():
    assert largest(lambda x: x <= 0.3, 0.0, 1.0) == pytest.approx(0.3, abs=1e-9)
    assert largest(lambda x: True, 0.0, 1.0) == 1.0
    assert largest(lambda x: False, 0.0, 1.0) is None


# ---- placing
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "head",
    [
        {"frequent": Budget(ratio=0.1), "local": Budget(ratio=0.1)},
        {"local": Budget(tokens=1020)},
        {"frequent": Budget(ratio=0.01), "k_dtype": "int4", "v_dtype": "int4"},
    ],
    ids=["h2o", "streaming", "int4"],
)
def test_bytes_come_nearest_below_the_target(head, point):
    found = place(bench(), entry(**head), point, LENGTH)
    assert found.kv_bytes == kv_bytes(found.plan, LENGTH, 1) <= target(point)
    if "k_dtype" in head and point == 0.5:  # every token in int4 and its score is less than half
        assert found.plan.heads[0][0].frequent == Budget(tokens=LENGTH)
        assert "of the target's bytes" in found.short
        return
    assert found.kv_bytes > (1 - TOLERANCE) * target(point) and found.short == ""
    more = scaled(found.plan, 1.0, extra_layers=SHAPE.layers)
    assert kv_bytes(more, LENGTH, 1) > target(point)  # one more token per head is too much


def test_a_code_of_all_tokens_stays_at_its_own_bytes():
    found = place(bench(), entry("quantization", full=True), 1 / 8, LENGTH)
    assert found.point is None and found.kv_bytes > target(0.5)


def test_a_byte_policy_is_turned_first():
    policy = BytesPolicy(kind="bytes", memory="1GiB")
    recipe = Recipe(name="ours", policy=policy)
    ours = Entry(name="ours", role="planned", description="", recipe=recipe)
    found = place(bench(), ours, 1 / 8, LENGTH)
    assert (1 - TOLERANCE) * target(1 / 8) < found.kv_bytes <= target(1 / 8)
    assert dial_of(policy) == "keep_ratio"
    assert dial_of(FastGenPolicy(kind="fastgen")) == "recovery"
    assert dial_of(StaticCurvePolicy(kind="static_curve", ratio=0.5)) == "ratio"
    assert dial_of(DuoPolicy(kind="duo")) == "full_share"
    assert dial_of(LayersPolicy(kind="layers", ratio=0.5)) == "ratio"
    assert dial_of(LayersPolicy(kind="layers", tokens=5)) is None


def test_what_cannot_shrink_so_far_is_refused():
    with pytest.raises(PlanError, match=r"needs more than \d+ bytes at 960 tokens"):
        place(bench(), entry(full=True), 1 / 8, LENGTH)
    with pytest.raises(PlanError, match=r"needs \d+ bytes without any budget, the target has"):
        place(bench(), entry(punct=True, frequent=Budget(tokens=4)), 1 / 40, LENGTH)


def test_relative_positions_bound_what_a_head_grows_to():
    """Half of the bytes of 2048 tokens would be more tokens than there are positions."""
    keep = Keep(positions="relative")
    recipe = Recipe(
        name="e",
        policy=UniformPolicy(kind="uniform", head=HeadPlan(local=Budget(ratio=0.3))),
        keep=keep,
    )
    relative = Entry(name="e", role="published", description="", recipe=recipe)

    def numbered(recipe: Recipe) -> Plan:
        return solve(recipe).model_copy(update={"positions": "relative", "max_position": 1024})

    found = place(Bench(SHAPE, numbered, numbered, bench().measure), relative, 1 / 2, 2048)
    budgets = {head.local.tokens for layer in found.plan.heads for head in layer}
    assert max(budgets) == 1024 - 4 - 2 * 16
    assert found.short.startswith("no larger plan of it fits")


def test_text_that_holds_fewer_class_tokens_than_expected_gives_a_larger_plan():
    """Accounting counts a tenth of the text as punctuation, the measured text has none."""
    seen = []

    def measure(plan: Plan, length: int) -> int:
        seen.append(plan)
        return kv_bytes(plan.model_copy(update={"punct_share": 0.0}), length, 1)

    found = place(bench(measure), entry(punct=True, frequent=Budget(tokens=50)), 1 / 4, LENGTH)
    assert found.measured and len(seen) > 1
    assert (1 - TOLERANCE) * target(1 / 4) <= found.kv_bytes <= 1.005 * target(1 / 4)
    assert found.kv_bytes < kv_bytes(found.plan, LENGTH, 1)


@pytest.mark.parametrize("at_least", [0.02, -3.0])
def test_a_threshold_is_turned_until_the_measured_bytes_fit(at_least):
    keep = Keep(per_request=Threshold(kind="threshold", at_least=at_least))
    first: list[float] = []

    def measure(plan: Plan, length: int) -> int:
        """Keeps a share of the cap that falls with the threshold."""
        assert isinstance(plan.per_request, Threshold)
        value = plan.per_request.at_least
        first.append(value)
        share = 0.35 * (at_least / value) if at_least > 0 else 0.35 - 0.05 * (value - at_least)
        return int(kv_bytes(plan, length, 1) * min(1.0, max(0.0, share)))

    found = place(bench(measure), entry(keep=keep, frequent=Budget(ratio=0.3)), 1 / 8, LENGTH)
    assert found.measured and first[0] == at_least
    assert (1 - 2 * TOLERANCE) * target(1 / 8) <= found.kv_bytes <= 1.005 * target(1 / 8)
    assert found.plan.per_request != keep.per_request


def test_fastgens_choice_is_turned_by_its_recovery_and_its_budgets_stay():
    choice = FastGenChoice(kind="fastgen", recovery=0.95)
    keep = Keep(per_request=choice)
    head = {"special": True, "punct": True}
    head |= {"frequent": Budget(ratio=0.3), "local": Budget(ratio=0.3)}

    def measure(plan: Plan, length: int) -> int:
        assert isinstance(plan.per_request, FastGenChoice)
        return int(plan.per_request.recovery * target(1.0) / 2)

    found = place(bench(measure), entry(keep=keep, **head), 1 / 8, LENGTH)
    assert isinstance(found.plan.per_request, FastGenChoice)
    assert found.plan.per_request.recovery == pytest.approx(0.25, abs=0.005)
    assert found.plan.heads[0][0].frequent == Budget(tokens=288)


def test_plans_without_a_rule_for_requests_have_no_dial():
    assert request_dial(uniform(SHAPE, HeadPlan(full=True))) is None
