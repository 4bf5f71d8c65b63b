"""The parity tests again on a CUDA device, where index and dtype mistakes show first."""

from __future__ import annotations

import pytest
import torch

from kvcompress import accounting
from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach, detach
from tests.runtime import oracle
from tests.runtime.battery import FULL, plan_for
from tests.runtime.models import SUPPORTED, build
from tests.runtime.test_parity import KEEP_SETS, PADS, greedy, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# float32 without TF32: sums in another order than on the CPU
TOLERANCE = 5e-5


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("family", SUPPORTED)
def test_v1_on_the_gpu(family):
    model, inputs = build(family).cuda(), on_gpu(prompts(3, 60, PADS))
    expected = greedy(model, inputs)
    attach(model, plan_for(model, FULL))
    got = greedy(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SUPPORTED)
def test_v2_on_the_gpu_equals_the_oracle_on_the_cpu(family):
    inputs = prompts(2, 48, PADS)
    tokens = prompts(2, 60)["input_ids"][:, 48:]
    model = build(family)
    plan = plan_for(model, *KEEP_SETS.values())
    expected, _ = oracle.run(model, plan, inputs, tokens)
    model = attach(model.cuda(), plan)
    got = oracle.feed(model, CompressedCache(plan), on_gpu(inputs), tokens.cuda())
    torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("k_dtype", ["fp8", "int8", "int4"])
def test_codes_on_the_gpu_equal_codes_on_the_cpu(k_dtype):
    inputs = prompts(2, 60, PADS)
    tokens = prompts(2, 80)["input_ids"][:, 60:]
    model = build("llama")
    head = HeadPlan(frequent=Budget(tokens=9), k_dtype=k_dtype, v_dtype="int4")
    plan = plan_for(model, head, HeadPlan(full=True, k_dtype=k_dtype))
    attach(model, plan)
    expected = oracle.feed(model, CompressedCache(plan), inputs, tokens)
    cache = CompressedCache(plan)
    got = oracle.feed(model.cuda(), cache, on_gpu(inputs), tokens.cuda())
    detach(model)
    # a code may round the other way where the two devices sum in another order
    torch.testing.assert_close(got.cpu(), expected, atol=2e-3, rtol=0)
    prompt = [60 - pad for pad in PADS[:2]]
    assert cache.nbytes() == accounting.cache_bytes(plan, [n + 19 for n in prompt], prompt)
