"""Finding the rotary embedding by probing, and the moments of un-rotated keys."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig

from kvcompress.profile.keys import find_rotations, key_moments
from kvcompress.runtime.families import shape_of
from tests.profile.conftest import SIZES, model_of


def rotations_of(model):
    return find_rotations(model, shape_of(model.config, model.dtype), token=7)


@pytest.mark.parametrize(
    "family, note",
    [
        ("llama", "half-split, 16 channels"),
        ("gemma2", "half-split, 16 channels"),
        ("gpt_neox", "half-split, 4 channels"),  # a quarter of the head is rotated
        ("opt", "none: the model has no rotary embedding"),
        ("gpt2", "none: the model has no rotary embedding"),
    ],
)
def test_the_family_is_recognised(family, note):
    assert [r.note for r in rotations_of(model_of(family))] == [note, note]


def test_interleaved_pairs_are_told_from_half_split():
    config = CohereConfig(**SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert [r.rotation.convention for r in rotations_of(model)] == ["interleaved"] * 2


def test_16_bit_models_are_recognised():
    found = rotations_of(model_of("llama").bfloat16())
    assert [r.note for r in found] == ["half-split, 16 channels"] * 2


def test_each_layer_gets_its_own_frequencies():
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=40, layer_types=kinds
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    local, full = (r.rotation.inv_freq for r in rotations_of(model))
    assert local[1] > full[1]  # base 10,000 against 1,000,000


def test_a_rotation_that_nothing_explains_is_not_guessed():
    model = model_of("llama")
    model.model.rotary_emb.attention_scaling = 1.0
    original = model.model.rotary_emb.forward

    def stretched(x, position_ids):
        return original(x, position_ids * 3)

    model.model.rotary_emb.forward = stretched
    found = rotations_of(model)
    assert [r.rotation for r in found] == [None, None]
    assert found[0].note.startswith("none: no rotary embedding explains the keys")


def test_moments_are_those_of_the_projection(llama, prompt):
    shape = shape_of(llama.config, llama.dtype)
    projected = []
    handle = llama.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: projected.append(out[0])
    )
    stats = key_moments(llama, shape, rotations_of(llama), prompt)
    handle.remove()
    key = projected[-1].double().unflatten(-1, (2, 16)).transpose(0, 1)
    assert stats[0].count == len(prompt)
    # float32 rotation forth, float64 back
    torch.testing.assert_close(stats[0].mean, key.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[0].var, key.var(1, correction=0), rtol=1e-4, atol=1e-5)
