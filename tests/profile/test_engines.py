"""What other engines offer beside a plan, from losses that are known."""

import pytest

from kvcompress.errors import PlanError
from kvcompress.plan import HeadPlan
from kvcompress.profile.engines import ENGINES, _offers, closest
from kvcompress.profile.solve import solve
from tests.profile.test_solve import NEEDS, bytes_policy, hurt, profile_of

NEED = sum(map(sum, NEEDS))
WORST = max(range(2), key=lambda i: sum(NEEDS[i]))  # of the two layers


def plan_of(loss):
    return solve(profile_of(), bytes_policy(keep_ratio=0.5)).model_copy(
        update={"predicted_loss": loss}
    )


def of(code):
    return hurt(HeadPlan(full=True, k_dtype=code, v_dtype=code))


def test_the_smallest_setting_that_loses_no_more():
    near = closest(profile_of(), plan_of(of("int4") * NEED * 1.01), "llama.cpp", 1000, 2)
    assert near.words == "-fa on -ctk q4_0 -ctv q4_0"
    assert near.loss == pytest.approx(of("int4") * NEED)
    # 2 layers of 2 heads, 64 + 64 numbers of 4 bits and a scale of 16 bits for each 32 of them
    assert near.kv_bytes == 2 * 2 * 1000 * 2 * (128 * 4 + 4 * 16) / 8
    near = closest(profile_of(), plan_of(of("int8") * NEED * 1.01), "llama.cpp", 1000, 2)
    assert near.words == "-fa on -ctk q8_0 -ctv q8_0"


def test_vllm_leaves_the_layers_out_that_lose_most():
    offers = {words: rest for *rest, words, _ in _offers(profile_of(), "vllm", 1000, 1)}
    size, loss = offers[f"--kv-cache-dtype turboquant_3bit_nc --kv-cache-dtype-skip-layers {WORST}"]
    assert loss == pytest.approx(of("rot3") * sum(NEEDS[1 - WORST]))
    assert size == 2 * 1000 * (128 * 3 + 2 * 16 + 128 * 16) / 8
    near = closest(profile_of(), plan_of(of("fp8") * NEED * 1.01), "vllm", 1000, 1)
    assert near.words == "--kv-cache-dtype fp8" and near.skipped == ()


def test_where_all_lose_more_the_one_that_loses_least():
    near = closest(profile_of(), plan_of(1e-9), "transformers", 1000, 1)
    assert '"nbits": 8' in near.words and near.loss > 1e-9
    assert "measured with our code of the same bits" in near.said("nats")
    assert near.facts()["plan_expected_loss"] == 1e-9


def test_what_cannot_be_answered_says_why():
    with pytest.raises(PlanError, match="--for mlx: give one of vllm, llama.cpp, transformers"):
        closest(profile_of(), plan_of(0.1), "mlx", 1000, 1)
    with pytest.raises(PlanError, match="the loss of this plan is not known"):
        closest(profile_of(), plan_of(None), "vllm", 1000, 1)
    bare = profile_of().model_copy(update={"parts": ("recovery",)})
    with pytest.raises(PlanError, match="--also losses"):
        closest(bare, plan_of(0.1), "vllm", 1000, 1)
    assert all(settings for settings in ENGINES.values())
