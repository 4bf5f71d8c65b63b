import pytest

from kvcompress.accounting import kv_bytes
from kvcompress.demo.plans import at_bytes, rivals
from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, ModelShape, uniform
from kvcompress.recipe import Keep

SHAPE = ModelShape(
    model_type="llama",
    config_hash="0",
    layers=4,
    query_heads=8,
    kv_heads=4,
    head_dim=64,
    sliding_windows=(None,) * 4,
    max_position=1024,
)


@pytest.mark.parametrize("ratio", (0.08, 0.125, 0.25, 0.4))
def test_rivals_hold_the_target_s_bytes(ratio):
    target = int(ratio * SHAPE.bf16_kv_bytes(960, 1))
    found = rivals(SHAPE, Keep(), target, 960)
    assert [row.name for row in found] == ["sink+recent int8", "random int8", "H2O int8"]
    for row in found:
        assert abs(kv_bytes(row.plan, 960, 1) - target) <= 0.02 * target
        assert not row.ships
    assert [row.plan.scorer for row in found] == ["lift", "random", "raw"]
    assert {row.plan.heads[0][0].k_dtype for row in found} == {"int8"}


def test_at_bytes_finds_the_nearest_budget():
    def make(tokens):
        return uniform(SHAPE, HeadPlan(local=Budget(tokens=tokens)))

    for tokens in (16, 100, 333):
        target = kv_bytes(make(tokens), 960, 1)
        assert kv_bytes(at_bytes(make, target, 960), 960, 1) == target


def test_a_target_beyond_every_budget_is_refused():
    def make(tokens):
        return uniform(SHAPE, HeadPlan(local=Budget(tokens=tokens)))

    with pytest.raises(PlanError, match="no budget comes within 2% of 9999999 bytes at 960 tokens"):
        at_bytes(make, 9_999_999, 960)
