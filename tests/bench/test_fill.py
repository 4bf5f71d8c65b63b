"""Synthetic caches hold what they say: the bytes of the plan, and keys that attention reads."""

from __future__ import annotations

import pytest
import torch
from speed.plans import Setup, plan_of, ragged_ratios, setups
from transformers import DynamicCache

from kvcompress.accounting import kv_bytes
from kvcompress.bench.compressed import fill_compressed, synthetic_refusal
from kvcompress.errors import KVCompressError
from kvcompress.measure import caches
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.rules import Recall
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.runtime.models import build

CONTEXT, BATCH = 120, 2


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def shape(model):
    return shape_of(model.config, model.dtype)


@pytest.fixture(scope="module")
def pair(shape):
    return caches.random_pair(BATCH, shape.kv_heads, CONTEXT, shape.head_dim, torch.float32)


def logits_of(model, cache, steps: int = 3) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.inference_mode():
        return torch.cat(
            [
                model(input_ids=ids[:, [step]], **as_argument(cache), use_cache=True).logits
                for step in range(steps)
            ],
            1,
        )


def test_attention_reads_the_random_keys(model, shape, pair):
    """The reference is a DynamicCache of the same keys and values; nothing is dropped or coded."""
    detach(model)
    expected = logits_of(model, caches.dynamic(model.config, pair))
    plan = plan_of(shape, Setup("model", "model", 1.0))
    attach(model, plan)
    try:
        found = logits_of(model, fill_compressed(plan, None, pair))
    finally:
        detach(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # sums in another order
    empty = logits_of(model, DynamicCache(config=model.config))
    assert (expected - empty).abs().max() > 0.1  # the keys matter


def test_a_static_cache_holds_the_same_keys(model, pair):
    detach(model)
    expected = logits_of(model, caches.dynamic(model.config, pair))
    found = logits_of(model, caches.static(model.config, pair, 3))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # sums in another order


@pytest.mark.parametrize("setup", setups(), ids=lambda setup: setup.name)
def test_filled_caches_hold_the_bytes_of_their_plan(shape, pair, setup):
    plan = plan_of(shape, setup)
    cache = fill_compressed(plan, None, pair)
    assert cache.nbytes() == kv_bytes(plan, CONTEXT, BATCH)
    assert cache.get_seq_length() == CONTEXT
    exact = plan.sink_tokens + plan.recent_tokens
    for layer in cache.compressed_layers:
        for group in layer.state.groups:
            for row in group.store.capacities:
                for head, capacity in zip(group.heads, row, strict=True):
                    wanted = _coded(plan.heads[layer.settings.layer][head], exact)
                    assert capacity == wanted, (layer.settings.layer, head)
            held = group.store.position
            assert int((held >= 0).sum()) == sum(map(sum, group.store.capacities)) - _empty(
                plan, group, exact
            )


def _coded(head: HeadPlan, exact: int) -> int:
    """Slots of a head, from the meaning of its budgets."""
    if head.full:
        return -(-(CONTEXT - exact) // 32) * 32
    frequent = head.frequent.resolve(CONTEXT)
    local = max(0, head.local.resolve(CONTEXT) - 16)
    return min(frequent + local, -(-(CONTEXT - exact) // 32) * 32)


def _empty(plan, group, exact: int) -> int:
    """Slots that a full head keeps free up to the next block of 32."""
    free = 0
    for row in group.store.capacities:
        free += sum(max(0, capacity - (CONTEXT - exact)) for capacity in row)
    return free


def test_transformers_caches_count_every_tensor(model, pair):
    layers, heads, dim = caches.kv_sizes(model.config)
    one = BATCH * heads * CONTEXT * dim * 4 * 2 * layers
    assert caches.storage_bytes(caches.dynamic(model.config, pair).layers) == one
    room = caches.static(model.config, pair, CONTEXT)
    counters = layers * 8  # how much of a layer is used
    assert caches.storage_bytes(room.layers) == 2 * one + counters
    fp8 = caches.quantized(model.config, pair, "fp8", None)
    scales = 2 * layers * 4
    assert caches.storage_bytes(fp8.layers) == one // 4 + scales


def test_a_quantizers_tensor_counts_its_parts_and_not_itself():
    outer = torch.zeros(100)
    outer._data, outer._scale = torch.zeros(8, dtype=torch.uint8), torch.zeros(2)
    assert caches.storage_bytes([outer, (outer, {"again": outer._scale})]) == 8 + 2 * 4


def test_budgets_differ_by_head_and_keep_their_mean():
    ratios = ragged_ratios(128, 0.2, 0)
    assert sum(ratios) / 128 == pytest.approx(0.2, abs=1e-9)
    assert min(ratios) < 0.08 and max(ratios) > 0.5 and max(ratios) <= 1.0
    assert ragged_ratios(128, 0.2, 1) != ratios
    assert sum(ragged_ratios(16, 0.9, 3)) / 16 == pytest.approx(0.9, abs=1e-9)
    with pytest.raises(ValueError, match="mean 1.0: give a share between"):
        ragged_ratios(4, 1.0, 0)


def test_plans_that_need_a_prompt_are_refused(shape, pair):
    full = HeadPlan(full=True)
    recall = uniform(shape, full, recall=Recall(resident=Budget(tokens=64)))
    kvzip = uniform(shape, HeadPlan(frequent=Budget(tokens=16)), scorer="kvzip")
    relative = uniform(shape, HeadPlan(local=Budget(tokens=32)), positions="relative")
    assert synthetic_refusal(uniform(shape, full)) is None
    assert synthetic_refusal(recall) == "a recall tier"
    assert synthetic_refusal(kvzip) == "a rule that looks at the whole prompt"
    assert synthetic_refusal(relative) == "relative positions"
    with pytest.raises(KVCompressError, match="random keys cannot stand for a prompt.*recall tier"):
        fill_compressed(recall, None, pair)


def test_class_tokens_are_drawn_at_the_shares_of_the_plan(shape, pair):
    head = HeadPlan(punct=True)
    settings = {"punct_ids": (5,), "punct_share": 0.5}
    plan = uniform(shape, head, **settings)
    cache = fill_compressed(plan, None, pair)
    (group,) = cache.compressed_layers[0].state.groups
    leaving = CONTEXT - plan.sink_tokens - plan.recent_tokens
    for row in group.store.capacities:
        assert len(set(row)) == 1  # every head keeps the punctuation that is there
        assert 0.3 * leaving < row[0] < 0.7 * leaving
    none = fill_compressed(uniform(shape, head, punct_ids=(5,)), None, pair)
    assert none.compressed_layers[0].state.groups[0].store.capacities == [[0, 0], [0, 0]]
