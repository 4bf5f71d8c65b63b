"""A decode step of the static cache by the Triton kernels equals the step by torch: same tokens,
same victims, same codes to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcompress.errors import KVCompressError
from kvcompress.plan import HeadPlan
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache
from kvcompress.runtime.static.cuda_graph import DecodeGraph
from tests.runtime.models import prompts
from tests.runtime.static_compare import assert_same_arrays
from tests.runtime.test_static import HEADS, assert_equal, decode, one_layer, plan_for

STEPS, MAX_TOKENS = 3, 40
PADS = [3, 0]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def stored(name: str, k_dtype: str, v_dtype: str) -> HeadPlan:
    return HEADS[name].model_copy(update={"k_dtype": k_dtype, "v_dtype": v_dtype})


CASES = {
    "four storages": (
        "llama_mha",
        [
            stored("frequent", "int8", "int8"),
            stored("punct_local", "int4", "int4"),
            stored("local", "fp8", "fp8"),
            stored("full", "model", "int4"),
        ],
        {"scorer": "lift"},
    ),
    "classes, soft cap, window": (
        "gemma2",
        [HEADS["capped_fastgen"], HEADS["punct"]],
        {"scorer": "mean"},
    ),
    "learned sinks": ("gpt_oss", [HEADS["frequent"], HEADS["capped"]], {"scorer": "raw"}),
    "aligned blocks": ("llama4", [HEADS["full"], HEADS["sink"]], {}),
    "scores that no vote changes": ("llama", [HEADS["frequent"]], {"scorer": "key_norm"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_by_triton_equals_a_step_by_torch(name):
    family, heads, settings = CASES[name]
    model, inputs = one_layer(family), prompts(2, 28, PADS)
    if "layer_types" in model.config.__dict__:
        model.config.layer_types = model.config.layer_types[:1]
    plan = plan_for(model, *heads, **settings)
    attach(model, plan)
    caches = [
        StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS, kernels=kernels)
        for kernels in ("triton", "torch")
    ]
    ours, theirs = (decode(model, model, cache, inputs, STEPS) for cache in caches)
    assert_equal(ours, theirs)
    assert_same_arrays(*caches, tolerance=1e-5)
    assert caches[0].static_layers[0].tables is not None
    assert caches[1].static_layers[0].tables is None


def test_protected_spans_and_padding_in_a_step():
    model, inputs = one_layer("llama"), prompts(2, 28, PADS)
    plan = plan_for(model, HEADS["frequent"], HEADS["capped"])
    attach(model, plan)
    spans = [[(0, 4), (10, 14)], []]
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], 1)
    caches = []
    for kernels in ("triton", "torch"):
        cache = StaticCompressedCache(plan, batch=2, max_tokens=60, protect=spans, kernels=kernels)
        decode(model, model, cache, inputs, 1)
        token = {"input_ids": torch.full((2, 1), 6), **as_argument(cache)}
        padded = torch.cat([mask[:, :1], mask], 1)
        model(**token, attention_mask=padded)
        caches.append(cache)
    assert_same_arrays(*caches, tolerance=1e-5)
    assert caches[0].static_layers[0].fixed.row_seen.tolist() == [28 - 3 + 2, 29]


def test_one_compiled_graph():
    model, inputs = one_layer("llama"), prompts(2, 28, PADS)
    plan = plan_for(model, HEADS["frequent"], HEADS["full"])
    attach(model, plan)
    caches = [
        StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS, kernels=kernels)
        for kernels in ("triton", "torch")
    ]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = decode(model, step, caches[0], inputs, 2)
    assert_equal(ours, decode(model, model, caches[1], inputs, 2))
    assert_same_arrays(*caches, tolerance=1e-5)


def test_the_graph_helper_runs_the_same_step():
    model, inputs = one_layer("llama"), prompts(2, 28, PADS)
    plan = plan_for(model, HEADS["fastgen"])
    attach(model, plan)
    logits = []
    for kernels in ("triton", "torch"):
        cache = StaticCompressedCache(plan, batch=2, max_tokens=30, kernels=kernels)
        position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=position, **as_argument(cache)).logits[:, -1]
        step, found = DecodeGraph(model, cache, capture=False), [out]
        for _ in range(2):
            found.append(step(found[-1].argmax(-1, keepdim=True)).clone())
        with pytest.raises(KVCompressError, match="31 tokens of prompt and answer"):
            step(found[-1].argmax(-1, keepdim=True))
        logits.append(torch.stack(found))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_what_the_kernels_cannot_read_is_refused():
    model = one_layer("llama")
    plan = plan_for(model, HeadPlan(full=True, k_dtype="int4", v_dtype="int4"))
    attach(model, plan)
    from kvcompress.runtime.static import triton_step as static_triton

    settings = StaticCompressedCache(plan, batch=1, max_tokens=9).static_layers[0].settings
    device = torch.device("cpu")
    with pytest.raises(KVCompressError, match="int4 of 18 channels: .* a multiple of 4"):
        static_triton.choose_kernels("triton", settings, 18, 18, device)
    assert static_triton.choose_kernels("triton", settings, 16, 16, device)
    assert not static_triton.choose_kernels("auto", settings, 16, 16, device)
