"""Published allocators against their definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile.allocate import layer_shares, layer_tokens, loss_at, within_one
from kvcompress.profile.solve import solve
from kvcompress.recipe import DuoPolicy, Keep, LayersPolicy, StaticCurvePolicy
from tests.profile.test_solve import LAYERS, NEEDS, PROFILE, hurt


def test_pyramidkv_written_out():
    """k_top = total/(βL), k_bottom = 2 total/L − k_top; the paper's 242 … 14 at 128 on average."""
    shares = layer_shares(32, 20.0)
    assert shares[-1] == pytest.approx(1 / 20) and shares[0] == pytest.approx(2 - 1 / 20)
    steps = {round(a - b, 9) for a, b in zip(shares, shares[1:], strict=False)}
    assert len(steps) == 1 and steps.pop() > 0
    assert layer_tokens(32 * 120, 32, 20.0)[0] == 234 and layer_tokens(32 * 120, 32, 20.0)[-1] == 6
    assert layer_shares(32, -20.0) == tuple(reversed(shares))
    assert layer_shares(5, 1.0) == (1.0,) * 5
    with pytest.raises(ValueError, match=r"beta 0\.5 is between"):
        layer_shares(4, 0.5)


@given(st.integers(0, 10**6), st.integers(1, 128), st.floats(1, 50), st.booleans())
def test_no_token_is_lost(total, layers, beta, funnel):
    tokens = layer_tokens(total, layers, -beta if funnel else beta)
    assert sum(tokens) == total and min(tokens) >= 0 and len(tokens) == layers
    exact = [total * share / layers for share in layer_shares(layers, -beta if funnel else beta)]
    assert all(abs(a - b) <= 1 for a, b in zip(tokens, exact, strict=True))


@given(st.lists(st.floats(0.001, 2), min_size=1, max_size=40))
def test_ratios_above_one_are_spread(ratios):
    found = within_one(ratios)
    assert max(found) <= 1
    assert sum(found) == pytest.approx(min(len(ratios), sum(ratios)))


def layers_plan(**settings):
    return solve(PROFILE, LayersPolicy(kind="layers", **settings))


def test_shapes_over_layers():
    plan = layers_plan(shape="pyramid", tokens=100, local=Budget(tokens=30))
    assert [row[0].frequent.tokens for row in plan.heads] == [195, 5]
    assert {h.local.tokens for row in plan.heads for h in row} == {30}
    assert [r[0].frequent.tokens for r in layers_plan(shape="funnel", tokens=100).heads] == [5, 195]
    flat = layers_plan(shape="flat", ratio=0.25)
    assert {h.frequent.ratio for row in flat.heads for h in row} == {0.25}
    wide = layers_plan(shape="pyramid", ratio=0.6)
    assert [r[0].frequent.ratio for r in wide.heads] == pytest.approx([1.0, 0.2])
    other = solve(PROFILE, LayersPolicy(kind="layers", tokens=9), Keep(scorer="raw"))
    assert other.scorer == "raw"
    with pytest.raises(PlanError, match="measure it: kvcompress profile by hand -r RECIPE"):
        calibrated = LayersPolicy(kind="layers", shape="calibrated", tokens=9)
        solve(PROFILE, calibrated, Keep(scorer="raw"))


def test_calibrated_follows_the_needs():
    """The later layer of the profile needs more: 100.01 against 11."""
    plan = layers_plan(shape="calibrated", ratio=0.2)
    assert plan.heads[0][0].frequent.ratio < plan.heads[1][0].frequent.ratio
    settings = PROFILE.settings[0]

    def loss(plan):
        return sum(
            loss_at(settings, layer, head, row[0].frequent.ratio, ("model", "model"))
            for layer, row in enumerate(plan.heads)
            for head in range(2)
        )

    others = [layers_plan(shape=s, ratio=0.2) for s in ("flat", "pyramid", "funnel")]
    assert loss(plan) <= min(map(loss, others))


def test_the_curve_runs_through_what_was_measured():
    """At a measured share the loss is the measured one; between two it lies between them."""
    setting = PROFILE.settings[0]
    head = HeadPlan(frequent=Budget(ratio=0.25), local=Budget(ratio=0.0625))
    at = loss_at(setting, 0, 1, 0.3125, ("int8", "int8"))
    assert at == pytest.approx(NEEDS[0][1] * hurt(head))
    assert loss_at(setting, 0, 1, 0.0, ("int8", "int8")) == NEEDS[0][1]
    assert at < loss_at(setting, 0, 1, 0.3, ("int8", "int8")) < NEEDS[0][1]
    with pytest.raises(PlanError, match="storage fp8/int4 was not measured"):
        loss_at(setting, 0, 0, 0.5, ("fp8", "int4"))


def share(head):
    if head.full:
        return 1.0
    return sum(b.ratio for b in (head.frequent, head.local) if b)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_static_curves_share_out_what_there_is(scope):
    policy = StaticCurvePolicy(kind="static_curve", ratio=0.3, scope=scope, k_dtype="int8")
    plan = solve(PROFILE, policy.model_copy(update={"v_dtype": "int8"}))
    shares = [[share(h) for h in row] for row in plan.heads]
    pools = [[s for row in shares for s in row]] if scope == "model" else shares
    for pool in pools:
        assert sum(pool) / len(pool) <= 0.3 + 1e-5
        assert min(pool) >= 0.2 * 0.3
    assert shares[1][0] > shares[1][1] and shares[0][1] > shares[0][0]
    assert {(h.k_dtype, h.v_dtype) for row in plan.heads for h in row} == {("int8", "int8")}


def test_pooling_over_the_model_never_predicts_worse_than_within_layers():
    plans = [
        solve(PROFILE, StaticCurvePolicy(kind="static_curve", ratio=0.3, scope=scope, floor=0.0))
        for scope in ("model", "layer")
    ]
    assert plans[0].predicted_loss <= plans[1].predicted_loss


def test_duo_by_repetition_needs_its_scores():
    policy = DuoPolicy(kind="duo", ranked_by="repetition", full_share=0.5)
    with pytest.raises(PlanError, match="too short for scores of heads by repetition"):
        solve(PROFILE, policy)
    known = PROFILE.model_copy(update={"repeat_heads": ((0.1, 0.9), (0.5, 0.2))})
    assert [[h.full for h in row] for row in solve(known, policy).heads] == [
        [False, True],
        [True, False],
    ]


@pytest.mark.parametrize("full_share, full", [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_duo_keeps_the_neediest_heads_full(full_share, full):
    window = Budget(tokens=64)
    plan = solve(PROFILE, DuoPolicy(kind="duo", full_share=full_share, local=window))
    heads = {(i, j): h for i, row in enumerate(plan.heads) for j, h in enumerate(row)}
    by_need = sorted(heads, key=lambda place: -NEEDS[place[0]][place[1]])
    assert [heads[place].full for place in by_need] == [True] * full + [False] * (4 - full)
    assert all(h.full or h.local == window for h in heads.values())
    assert len(plan.heads) == LAYERS
