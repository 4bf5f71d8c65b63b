"""The static cache's decode step on a CUDA device: by Triton, captured, without waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache
from kvcompress.runtime.static.cuda_graph import DecodeGraph
from tests.interpreted.test_step import CASES
from tests.runtime.models import build, prompts
from tests.runtime.static_compare import assert_same_arrays
from tests.runtime.test_static import HEADS, decode, one_layer, plan_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says that its check for waiting is a prototype, and that float32 could be faster
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
PADS, MAX_TOKENS = [3, 0], 80
# float32 sums in another order than on the CPU; model logits are of standard deviation 1 to 2
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_triton_on_the_gpu_equals_torch_on_the_gpu(name):
    family, heads, settings = CASES[name]
    model, inputs = one_layer(family).cuda(), on_gpu(prompts(2, 28, PADS))
    if "layer_types" in model.config.__dict__:
        model.config.layer_types = model.config.layer_types[:1]
    plan = plan_for(model, *heads, **settings)
    attach(model, plan)
    caches = [
        StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS, kernels=kernels)
        for kernels in ("auto", "torch")
    ]
    ours, theirs = (decode(model, model, cache, inputs, 30) for cache in caches)
    assert caches[0].static_layers[0].tables is not None
    torch.testing.assert_close(ours[0], theirs[0], atol=TOLERANCE, rtol=0)
    assert torch.equal(ours[1], theirs[1])
    arrays = [layer.fixed for cache in caches for layer in cache.static_layers]
    assert torch.equal(arrays[0].exact_position, arrays[1].exact_position)
    for one, other in zip(arrays[0].groups, arrays[1].groups, strict=True):
        assert torch.equal(one.position[:-1], other.position[:-1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_captured_step_equals_an_eager_one(family, compiled):
    model, inputs = build(family).cuda(), on_gpu(prompts(2, 28, PADS))
    head = HeadPlan(frequent=Budget(tokens=9), local=Budget(tokens=4))
    plan = plan_for(model, head, HEADS["full"])
    attach(model, plan)
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    caches, found = [], []
    for capture in (True, False):
        cache = StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS)
        logits = model(**inputs, position_ids=position, **as_argument(cache)).logits[:, -1]
        step = torch.compile(model, fullgraph=True) if compiled and capture else None
        run, line = DecodeGraph(model, cache, step, capture), [logits]
        for _ in range(12):
            line.append(run(line[-1].argmax(-1, keepdim=True)).clone())
        assert run.captured == capture
        caches.append(cache)
        found.append(torch.stack(line))
    tolerance = 2e-4 if compiled else 0  # a compiled model adds in another order
    torch.testing.assert_close(*found, atol=tolerance, rtol=0)
    if not compiled:
        assert_same_arrays(*caches, tolerance=0)
        cache = caches[0]
        cache.reset()
        other = on_gpu(prompts(2, 17))
        logits = model(**other, **as_argument(cache)).logits[:, -1]
        again = StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS)
        expected = model(**other, **as_argument(again)).logits[:, -1]
        assert torch.equal(logits, expected)


def test_a_graph_serves_the_next_prompt():
    model = build("llama").cuda()
    plan = plan_for(model, HEADS["frequent"], HEADS["local"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=1, max_tokens=MAX_TOKENS)
    token = torch.full((1, 1), 6, device="cuda")
    model(**on_gpu(prompts(1, 30)), **as_argument(cache))
    step = DecodeGraph(model, cache)
    for _ in range(5):
        step(token)
    cache.reset()
    model(**on_gpu(prompts(1, 11)), **as_argument(cache))
    other = StaticCompressedCache(plan, batch=1, max_tokens=MAX_TOKENS)
    model(**on_gpu(prompts(1, 11)), **as_argument(other))
    for _ in range(5):
        got = step(token).clone()
        expected = model(input_ids=token, **as_argument(other)).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert_same_arrays(cache, other, tolerance=1e-5)


def test_a_step_waits_for_nothing_and_a_replay_allocates_nothing():
    model = build("llama").cuda()
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"], scorer="lift")
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=MAX_TOKENS)
    model(**on_gpu(prompts(2, 30)), **as_argument(cache))
    token = torch.full((2, 1), 6, device="cuda")
    eager = DecodeGraph(model, cache, capture=False)
    eager(token)  # compiles, and asks once how much the cache holds
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            eager(token)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    step = DecodeGraph(model, cache)
    for _ in range(4):
        step(token)
    assert step.captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = torch.cuda.memory_stats()
        for _ in range(20):
            step(token)
        after = torch.cuda.memory_stats()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for name in ("allocation.all.allocated", "segment.all.allocated"):
        assert after[name] == stats[name], name
    assert int(cache.get_seq_length()) == 30 + 1 + 3 + 4 + 20
