"""The order of candidates, and predicted losses that follow it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile.candidates import (
    candidates,
    codes_nothing,
    lower_envelope,
    small_candidates,
    within,
)
from kvcompress.recipe import BytesPolicy, Recipe, UniformPolicy

HEADS = candidates(Recipe(), 64)


def test_candidates_are_distinct_and_cover_what_policies_ask_for():
    assert len(HEADS) == len(set(HEADS)) > 100
    assert sum(map(codes_nothing, HEADS)) == 1
    own = HeadPlan(local=Budget(tokens=77), k_dtype="fp8", v_dtype="int8")
    assert own in candidates(Recipe(policy=UniformPolicy(kind="uniform", head=own)), 64)
    pairs = (("fp8", "rot2"), ("int4", "int4"))  # whatever a byte plan may choose from
    asked = Recipe(policy=BytesPolicy(kind="bytes", keep_ratio=0.5, dtypes=pairs))
    for found in (candidates(asked, 64), small_candidates(asked, 64)):
        for k, v in pairs:
            assert HeadPlan(local=Budget(ratio=0.25), k_dtype=k, v_dtype=v) in found
    odd = candidates(Recipe(), 63)
    assert {d for head in odd for d in (head.k_dtype, head.v_dtype)} <= {"model", "int8", "fp8"}


def test_order_by_hand():
    small = HeadPlan(frequent=Budget(ratio=0.1), k_dtype="int4", v_dtype="int4")
    assert within(small, HeadPlan(full=True, k_dtype="int8", v_dtype="int4"))
    assert within(small, small.model_copy(update={"punct": True, "k_dtype": "fp8"}))
    assert within(HeadPlan(k_dtype="model"), HeadPlan(special=True, k_dtype="int4"))
    assert not within(small, HeadPlan(local=Budget(ratio=0.9)))
    assert not within(HeadPlan(full=True), HeadPlan(frequent=Budget(ratio=1.0)))
    assert not within(HeadPlan(full=True, k_dtype="fp8"), HeadPlan(full=True, k_dtype="int8"))
    assert not within(HeadPlan(local=Budget(tokens=9)), HeadPlan(local=Budget(ratio=0.9)))


def test_the_order_is_one():
    for a in HEADS[::3]:
        assert within(a, a)
        for b in HEADS[::5]:
            assert not (within(a, b) and within(b, a)) or a == b
            for c in HEADS[::7]:
                assert not (within(a, b) and within(b, c)) or within(a, c)


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_adding_a_bit_or_a_token_never_makes_the_predicted_loss_worse(seed):
    losses = torch.rand(2, len(HEADS), generator=torch.Generator().manual_seed(seed))
    smooth = lower_envelope(losses, HEADS)
    assert (smooth <= losses).all()
    for i, small in enumerate(HEADS):
        for j in range(0, len(HEADS), 11):
            if within(small, HEADS[j]):
                assert (smooth[:, j] <= smooth[:, i]).all()


def test_losses_that_follow_the_order_stay_as_they_are():
    rank = torch.tensor([float(sum(within(h, other) for other in HEADS)) for h in HEADS])
    torch.testing.assert_close(lower_envelope(rank[None], HEADS)[0], rank)
