"""From summed losses to what is expected."""

import pytest

from kvcompress.plan import HeadPlan
from kvcompress.profile.assemble import expected, summed_loss
from tests.profile.test_solve import HEADS, LAYERS, PROFILE

BARE = ((HeadPlan(),) * HEADS,) * LAYERS
MEASURED = PROFILE.model_copy(update={"path_nats": (0.01, 0.2, 0.9, 2.0, 3.0)})


def test_losses_are_read_off_the_path():
    whole = summed_loss(MEASURED, BARE)
    assert whole == pytest.approx(111.01)
    assert expected(MEASURED, 0.0) == 0.0
    assert expected(MEASURED, 0.375 * whole) == pytest.approx(0.2)
    assert expected(MEASURED, 0.25 * whole) == pytest.approx((0.01 + 0.2) / 2)
    assert expected(MEASURED, whole) == pytest.approx(3.0)
    assert expected(MEASURED, 2 * whole) == pytest.approx(6.0)


def test_losses_without_gradients_are_summed():
    assert expected(PROFILE, 7.5) == 7.5


def test_a_head_that_was_not_measured_has_no_expectation():
    odd = HeadPlan(full=True, k_dtype="fp8", v_dtype="int4")
    assert summed_loss(PROFILE, ((odd,) * HEADS,) * LAYERS) is None
