"""A prompt needs one layer's full keys and values, the compressed rest, and activations."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcompress.accounting import kv_bytes, prefill_bytes
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.prompt.attention_inputs import new_scores
from kvcompress.runtime.store.attend import Chunk
from kvcompress.runtime.store.state import LayerSettings, LayerState
from tests.runtime.live import LiveBytes

TOKENS = 1536
EIGHTH = HeadPlan(frequent=Budget(ratio=0.0625), local=Budget(ratio=0.0625))
PLANS = {
    "int8": (HeadPlan(full=True), {}),
    "int4": (HeadPlan(full=True, k_dtype="int4", v_dtype="int4"), {}),
    "all rows vote": (EIGHTH, {}),
    "last rows vote": (EIGHTH, {"score_rows": 64}),
    "sums estimated": (EIGHTH, {"score_rows": 64, "score_stride": 32}),
    "value aware": (EIGHTH, {"scorer": "value"}),
}


def model_of(layers: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).eval()


def prefill(model, cache) -> LiveBytes:
    """What was alive while a prompt ran."""
    ids = torch.randint(3, 60, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), LiveBytes(*model.parameters(), *model.buffers()) as live:
        model(ids, **as_argument(cache), use_cache=cache is not None, logits_to_keep=1)
    return live


def peaks(layers: int, name: str | None) -> tuple[int, int]:
    """(peak, bytes of the cache) of a prompt, with transformers' own cache or under a plan."""
    model = model_of(layers)
    if name is None:
        cache = DynamicCache(config=model.config)
        peak = prefill(model, cache).peak
        return peak, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    head, settings = PLANS[name]
    attach(model, uniform(shape_of(model.config, model.dtype), head, **settings))
    cache = new_cache(model)
    peak = prefill(model, cache).peak
    detach(model)
    return peak, cache.nbytes()


def test_the_count_sees_what_a_full_cache_holds():
    """Each layer more of it adds its whole keys and values to the peak."""
    (few, _), (many, held) = peaks(2, None), peaks(6, None)
    layer = held // 6
    assert layer == TOKENS * 4 * 64 * 2 * 4
    assert many - few == 4 * layer


@pytest.mark.parametrize("name", PLANS)
def test_each_layer_adds_its_compressed_bytes_to_the_peak(name):
    """And nothing else: no layer's full keys and values outlive the layer."""
    (few, held_few), (many, held_many) = peaks(2, name), peaks(6, name)
    # beside the cache each layer has its key constants and a few numbers for each head
    settings = (many - few - (held_many - held_few)) / 4
    constants = 2 * 4 * 64 * 4
    assert constants <= settings < constants + 128
    assert 4 * kv_bytes(_plan(2, name), TOKENS, 1) == 2 * (held_many - held_few)


@pytest.mark.parametrize("name", PLANS)
def test_the_peak_is_one_layer_the_compressed_rest_and_a_forward(name):
    """What scoring, ranking and encoding need beside is less than another layer's."""
    model = model_of(4)
    layer = prefill_bytes(shape_of(model.config, model.dtype), TOKENS, 1)
    forward = prefill(model, None).peak  # activations and one layer's keys and values
    peak, held = peaks(4, name)
    assert forward < peak < forward + held + layer


@pytest.mark.parametrize("name", PLANS)
def test_no_second_layers_keys_and_values_are_ever_alive(name, monkeypatch):
    """Asked for whenever a layer is given its keys: those of all layers before are gone."""
    alive: list[tuple[int, StorageWeakRef]] = []
    counts = []
    real = CompressedLayer.update

    def update(self, key_states, value_states, *args, **kwargs):
        mine = self.settings.layer
        alive[:] = [(layer, ref) for layer, ref in alive if not ref.expired()]
        counts.append(len({layer for layer, _ in alive if layer != mine}))
        for tensor in (key_states, value_states):
            alive.append((mine, StorageWeakRef(tensor.untyped_storage())))
        return real(self, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(CompressedLayer, "update", update)
    peaks(4, name)
    assert counts == [0, 0, 0, 0]
    alive[:] = [(layer, ref) for layer, ref in alive if not ref.expired()]
    assert not alive


def _plan(layers: int, name: str):
    head, settings = PLANS[name]
    model = model_of(layers)
    return uniform(shape_of(model.config, model.dtype), head, **settings)


def test_new_scores_copy_no_keys():
    """Where all heads are one group, a scorer is shown the chunk's own keys and values."""
    plan = _plan(1, "all rows vote")
    key = torch.randn(1, 4, TOKENS, 64)
    chunk = Chunk(key, key, key.clone(), 0, None, None, None, 0.1, None)
    state = LayerState.empty(LayerSettings(plan, None, 0), key, key, [()])
    with LiveBytes(key, chunk.value) as live:
        new_scores(state, chunk)
    assert live.peak < key.nbytes / 8
