"""Finding the rotary embedding of a layer by probing, and turning vectors by it."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    Phi3Config,
    SmolLM3Config,
)

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.quant.keystats import Rotation
from kvcompress.runtime.layer.relative import serving_rotations
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.model.rotation import angles, find_rotations, turn
from tests.profile.conftest import SIZES, model_of

GQA = {**SIZES, "num_key_value_heads": 2}


def rotations_of(model, **settings):
    return find_rotations(model, shape_of(model.config, model.dtype), token=7, **settings)


def of_config(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "family, note, explained",
    [
        ("llama", "half-split, 16 channels", True),
        ("gemma2", "half-split, 16 channels", True),
        ("gpt_neox", "half-split, 4 channels", True),  # a quarter of the head is rotated
        ("opt", "none: the model has no rotary embedding", False),
        ("gpt2", "none: the model has no rotary embedding", False),
    ],
)
def test_the_family_is_recognised(family, note, explained):
    found = rotations_of(model_of(family))
    assert [(r.note, r.explained) for r in found] == [(note, explained)] * 2


def test_interleaved_pairs_are_told_from_half_split():
    found = rotations_of(of_config(CohereConfig(**GQA)))
    assert [r.rotation.convention for r in found] == ["interleaved"] * 2


def test_16_bit_models_are_recognised():
    found = rotations_of(model_of("llama").bfloat16())
    assert [r.note for r in found] == ["half-split, 16 channels"] * 2


def test_each_layer_gets_its_own_frequencies():
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**GQA, head_dim=16, sliding_window=40, layer_types=kinds)
    local, full = (r.rotation.inv_freq for r in rotations_of(of_config(config)))
    assert local[1] > full[1]  # base 10,000 against 1,000,000


def test_a_layer_without_positions_needs_no_turning():
    first, second = rotations_of(of_config(SmolLM3Config(**GQA, no_rope_layers=[1, 0])))
    assert first.rotation is not None
    assert second.rotation is None and second.explained
    assert second.note == "none: keys do not depend on their position"


def test_a_rotation_that_nothing_explains_is_not_guessed():
    model = model_of("llama")
    original = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: original(x, position_ids * 3)
    found = rotations_of(model)
    assert [(r.rotation, r.explained) for r in found] == [(None, False)] * 2
    assert found[0].note.startswith("none: no rotary embedding explains the keys")


def test_frequencies_that_change_with_the_length_are_noticed():
    """LongRoPE (arXiv 2402.13753) rotates a longer prompt by other frequencies."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [float(i) for i in range(2, 10)],
        "rope_theta": 10000.0,
    }
    config = Phi3Config(**GQA, original_max_position_embeddings=64, rope_parameters=scaling)
    model = of_config(config)
    assert all(r.explained for r in rotations_of(model))
    assert all(r.explained for r in rotations_of(model, last_position=63))
    assert not any(r.explained for r in rotations_of(model, last_position=64))
    assert all(r.explained for r in rotations_of(model))  # the probe leaves the usual frequencies


def test_a_token_whose_embedding_is_zero_tells_nothing():
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    found = rotations_of(model)
    assert all(r.silent and not r.explained for r in found)


def test_serving_tries_another_token():
    model = model_of("llama")
    plan = uniform(shape_of(model.config), HeadPlan(local=Budget(tokens=20)), recent_tokens=4)
    half = model.config.vocab_size // 2
    with torch.no_grad():
        model.model.embed_tokens.weight[half] = 0
    assert all(r is not None for r in serving_rotations(model, plan))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with pytest.raises(UnsupportedModelError, match="in layer 0 the probe's keys are zero"):
        serving_rotations(model, plan)


@pytest.mark.parametrize("convention", ["half-split", "interleaved"])
def test_turning_equals_the_exact_rotation(convention):
    rotation = Rotation(torch.tensor([1.0, 0.03125, 0.5]).double(), convention)
    vectors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([0, 3, 1, 60000, 131071])
    exact = rotation.turn(vectors.double(), position)
    got = turn(vectors, angles(rotation, position), rotation)
    # float32 cosines and products of numbers up to 3
    torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=0)


def test_a_difference_of_angles_takes_back_the_model_s_own_rotation_far_out():
    """At position 130,000 float32 angles are off by up to 0.004, the same way in both."""
    model = model_of("llama")
    freq = model.model.rotary_emb.inv_freq
    rotation = Rotation(freq.double(), "half-split")
    place = torch.tensor([130_001])
    cos, sin = model.model.rotary_emb(torch.zeros(1), place[None])
    key = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    half = torch.cat([-key[8:], key[:8]])
    rotated = key * cos[0, 0].double() + half * sin[0, 0].double()
    back = turn(rotated, -angles(rotation, place)[0], rotation)
    torch.testing.assert_close(back, key, atol=1e-6, rtol=0)
    naive = rotation.turn(rotated[None], place, sign=-1)[0]
    assert (naive - key).abs().max() > 1e-4
