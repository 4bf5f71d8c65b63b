"""From summed losses to what is expected."""

import pytest

from kvcompress.plan import HeadPlan
from kvcompress.profile.assemble import (
    assemble,
    expected,
    expected_recall,
    plan_digest,
    summed_loss,
    summed_nats,
)
from kvcompress.profile.store import TriedPlan
from tests.profile.test_solve import HEADS, LAYERS, PROFILE

CURVE = ((0.5, 0.001), (2.0, 0.008), (3.0, 0.007), (4.0, 0.04), (10.0, 0.2))
MEASURED = PROFILE.model_copy(
    update={
        "tried": tuple(TriedPlan(name="", loss=x, nats=y, recall_nats=10 * y) for x, y in CURVE)
    }
)


def test_losses_are_read_off_the_plans_that_were_tried():
    for loss, nats in (CURVE[0], CURVE[1], CURVE[3], CURVE[4]):
        assert expected(MEASURED, loss) == pytest.approx(nats)
        assert summed_nats(MEASURED, nats) == pytest.approx(loss)
    # in between as a power, past a point that noise put too low
    assert expected(MEASURED, 8**0.5) == pytest.approx((0.008 * 0.04) ** 0.5)
    assert expected(MEASURED, 0.25) == pytest.approx(0.001 * 0.5**1.5)  # 8 times for 4 times
    assert expected(MEASURED, 20.0) == pytest.approx(0.4)
    assert expected(MEASURED, 0.0) == 0.0
    losses = [0.01 * 1.1**i for i in range(80)]
    found = [expected(MEASURED, loss) for loss in losses]
    assert found == sorted(found)
    assert [summed_nats(MEASURED, nats) for nats in found] == pytest.approx(losses)


def test_a_plan_that_was_tried_has_its_own_loss():
    heads = ((HeadPlan(full=True),) * HEADS,) * LAYERS
    keep = PROFILE.recipe.keep
    digest = plan_digest(keep, heads)
    own = TriedPlan(name="own", digest=digest, loss=None, nats=0.125, recall_nats=0.5)
    known = MEASURED.model_copy(update={"tried": (*MEASURED.tried, own)})

    def losses(profile, keep):
        plan = assemble(profile, keep, heads, "", 2.0)
        return plan.predicted_loss, plan.predicted_recall_loss

    assert losses(known, keep) == (0.125, 0.5)
    assert losses(MEASURED, keep) == pytest.approx((0.008, 0.08))
    other = keep.model_copy(update={"sink_tokens": 2})
    assert losses(known, other) == pytest.approx((0.008, 0.08))
    assert losses(PROFILE, keep) == (2.0, None)  # nothing was tried
    unknown = assemble(MEASURED, keep, heads, "", None)
    assert unknown.predicted_loss is unknown.predicted_recall_loss is None


def test_questions_have_a_curve_of_their_own():
    for loss, nats in (CURVE[0], CURVE[1], CURVE[3], CURVE[4]):
        assert expected_recall(MEASURED, loss) == pytest.approx(10 * nats)
    assert expected_recall(MEASURED, 20.0) == pytest.approx(4.0)
    assert expected_recall(MEASURED, 0.0) == 0.0
    plain = MEASURED.model_copy(
        update={"tried": tuple(TriedPlan(name="", loss=x, nats=y) for x, y in CURVE)}
    )
    assert expected_recall(plain, 2.0) is None


def test_losses_without_gradients_are_summed():
    assert expected(PROFILE, 7.5) == 7.5


def test_a_head_that_was_not_measured_has_no_expectation():
    odd = HeadPlan(full=True, k_dtype="fp8", v_dtype="int4")
    assert summed_loss(PROFILE, ((odd,) * HEADS,) * LAYERS) is None
