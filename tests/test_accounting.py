"""Bytes by hand."""

from __future__ import annotations

import pytest

from kvcompress import accounting
from kvcompress.plan import Budget, HeadPlan, ModelShape, uniform


def shape(**changes) -> ModelShape:
    facts = {
        "model_type": "llama",
        "config_hash": "x",
        "layers": 2,
        "query_heads": 8,
        "kv_heads": 4,
        "head_dim": 64,
        "sliding_windows": (None, None),
        "max_position": 1024,
    }
    return ModelShape(**{**facts, **changes})


@pytest.mark.parametrize(
    ("k", "v", "expected"),
    [
        ("model", "model", 256 + 4),
        ("int8", "int8", 2 * (64 + 4) + 4),
        ("int4", "int4", 2 * (32 + 4) + 4),
        ("int8", "int4", 68 + 36 + 4),
        ("fp8", "fp8", 2 * 66 + 4),
    ],
)
def test_slot_bytes(k, v, expected):
    head = HeadPlan(full=True, k_dtype=k, v_dtype=v)
    assert accounting.slot_bytes(head, shape()) == expected
    scored = HeadPlan(frequent=Budget(tokens=3), k_dtype=k, v_dtype=v)
    assert accounting.slot_bytes(scored, shape()) == expected + 4


def test_int8_is_below_six_tenths_of_bf16():
    plan = uniform(shape(), HeadPlan(full=True))
    for context in (512, 1024, 4096):
        assert accounting.kv_bytes(plan, context, 1) <= 0.60 * shape().bf16_kv_bytes(context, 1)


def test_capacity_grows_in_blocks_up_to_the_budget():
    plan = uniform(shape(), HeadPlan(frequent=Budget(tokens=40), local=Budget(tokens=20)))
    head = plan.heads[0][0]  # 4 sinks, 16 recent: 4 of the local tokens are coded
    found = [
        accounting.capacity_tokens(plan, 0, head, n, 100, 0) for n in (10, 20, 21, 52, 53, 999)
    ]
    assert found == [0, 0, 32, 32, 44, 44]
    assert accounting.capacity_tokens(plan, 0, head, 999, 100, 3) == 47


def test_a_sliding_layer_never_holds_more_than_its_window():
    plan = uniform(shape(sliding_windows=(128, None)), HeadPlan(full=True))
    head = plan.heads[0][0]
    assert accounting.sinks_of(plan, 0) == 0
    assert accounting.capacity_tokens(plan, 0, head, 5000, 5000, 0) == 128 - 16
    assert shape(sliding_windows=(128, None)).bf16_kv_bytes(1000, 1) == 2 * 4 * 64 * 2 * (
        128 + 1000
    )


def test_a_larger_budget_never_costs_less():
    plan = uniform(shape(), HeadPlan())
    sizes = [
        accounting.head_plan_bytes(plan, 0, HeadPlan(frequent=Budget(ratio=r / 50)), 1000, 2)
        for r in range(1, 51)
    ]
    assert sizes == sorted(sizes)
