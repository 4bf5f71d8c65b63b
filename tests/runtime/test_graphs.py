"""`DecodeGraph` without a capture: the same tokens as by hand, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.errors import KVCompressError, PositionRangeWarning
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.static.cache import StaticCompressedCache
from kvcompress.runtime.static.cuda_graph import DecodeGraph
from tests.runtime.models import build, prompts
from tests.runtime.test_static import HEADS, MAX_TOKENS, decode, one_layer, plan_for

PADS = [7, 1, 0]
# what waits for the device, or copies from the host
WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"),
    *("aten::masked_select", "aten::unique_dim", "aten::lift_fresh"),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class NoWaiting(TorchDispatchMode):
    """Fails where an operation would make the host wait on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in WAITS, func._schema.name
        return func(*args, **(kwargs or {}))


def prompt(model, cache, inputs):
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=position, **as_argument(cache)).logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_same_tokens_as_by_hand_and_nothing_read_back(family):
    model, inputs = build(family), prompts(3, 40, PADS)
    plan = plan_for(model, HEADS["fastgen"], HEADS["full"])
    attach(model, plan)
    caches = [StaticCompressedCache(plan, batch=3, max_tokens=MAX_TOKENS) for _ in range(2)]
    expected, tokens = decode(model, model, caches[0], inputs, 6)
    logits = [prompt(model, caches[1], inputs)]
    step = DecodeGraph(model, caches[1], capture=False)
    logits.append(step(logits[-1].argmax(-1, keepdim=True)).clone())  # asks once how much it holds
    with NoWaiting():
        for _ in range(5):
            logits.append(step(logits[-1].argmax(-1, keepdim=True)).clone())
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-6, rtol=0)
    assert torch.equal(torch.stack(logits[:-1], 1).argmax(-1), tokens)


def test_the_check_for_waiting_notices():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        int(torch.ones(()))
    with pytest.raises(AssertionError, match="lift_fresh"), NoWaiting():
        torch.tensor([1, 2])


def test_a_further_prompt_goes_on_with_the_same_graph():
    model = one_layer("llama")
    plan = plan_for(model, HEADS["local"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=1, max_tokens=12)
    token = prompt(model, cache, prompts(1, 10)).argmax(-1, keepdim=True)
    step = DecodeGraph(model, cache, capture=False)
    step(token)
    step(token)
    with pytest.raises(KVCompressError, match="13 tokens of prompt and answer.*max_tokens=12"):
        step(token)
    cache.reset()
    with pytest.raises(KVCompressError, match="holds no prompt"):
        step(token)
    expected = CompressedCache(plan)
    for held in (cache, expected):
        prompt(model, held, prompts(1, 5))
    one = model(input_ids=token, **as_argument(expected)).logits[:, -1]
    torch.testing.assert_close(step(token), one, atol=1e-5, rtol=0)
    assert cache.room() == 12 - 6


def test_positions_beyond_the_plan_warn_once():
    model = one_layer("llama")
    plan = plan_for(model, HEADS["local"], max_position=21)
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=1, max_tokens=40)
    token = prompt(model, cache, prompts(1, 20)).argmax(-1, keepdim=True)
    step = DecodeGraph(model, cache, capture=False)
    step(token)
    with pytest.warns(PositionRangeWarning, match="position 21 is beyond 20") as caught:
        for _ in range(3):
            step(token)
    assert len(caught) == 1


def test_what_is_refused():
    model = one_layer("llama")
    plan = plan_for(model, HEADS["full"])
    attach(model, plan)
    cache = StaticCompressedCache(plan, batch=2, max_tokens=20)
    with pytest.raises(KVCompressError, match="CompressedCache moves its tensors"):
        DecodeGraph(model, CompressedCache(plan))
    with pytest.raises(KVCompressError, match="holds no prompt"):
        DecodeGraph(model, cache, capture=False)
    prompt(model, cache, prompts(2, 8))
    with pytest.raises(KVCompressError, match="CUDA graphs need a CUDA device.*cpu"):
        DecodeGraph(model, cache)
    with pytest.raises(KVCompressError, match="training mode"):
        DecodeGraph(model.train(), cache, capture=False)
    step = DecodeGraph(model.eval(), cache, capture=False)
    with pytest.raises(KVCompressError, match=r"ids \(1, 1\): give \(2, 1\)"):
        step(torch.zeros(1, 1, dtype=torch.int64))
