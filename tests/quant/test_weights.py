"""Weight formats: which layers they take, what they cost, and that they say nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvcompress.quant.weights import FORMATS
from kvcompress.quant.weights.base import (
    linear_layers,
    misfits,
    output_heads,
    weights_bytes,
)


def llama(hidden: int, intermediate: int) -> LlamaForCausalLM:
    """One layer on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )


def test_registry_names_are_the_formats_own() -> None:
    assert {name: form.name for name, form in FORMATS.items()} == {
        "bf16": "bf16",
        "int8": "int8",
        "nf4": "nf4",
    }


@pytest.mark.parametrize(
    ("out_features", "in_features", "fits"),
    [(32, 64, True), (64, 128, True), (16, 64, False), (33, 64, False), (64, 96, False)],
)
def test_nf4_needs_whole_blocks(out_features: int, in_features: int, fits: bool) -> None:
    assert FORMATS["nf4"].fits(out_features, in_features) is fits
    assert FORMATS["int8"].fits(out_features, in_features)
    assert FORMATS["bf16"].fits(out_features, in_features)


def test_misfits_are_named_and_the_output_head_is_not_among_them() -> None:
    model = llama(hidden=128, intermediate=176)
    names = ("gate_proj", "up_proj", "down_proj")  # 176 rows, or 176 columns
    assert misfits(model, FORMATS["nf4"]) == tuple(f"model.layers.0.mlp.{n}" for n in names)
    assert misfits(model, FORMATS["int8"]) == ()
    assert misfits(llama(hidden=128, intermediate=192), FORMATS["nf4"]) == ()
    assert output_heads(model) == ("lm_head",)


def test_transposed_layers_of_gpt2_count_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, n_layer=1, vocab_size=96))
    sizes = linear_layers(model)
    assert sizes["transformer.h.0.attn.c_attn"] == (3 * 48, 48)
    assert "transformer.h.0.attn.c_attn" in misfits(model, FORMATS["nf4"])


def test_bytes_by_format() -> None:
    model = llama(hidden=128, intermediate=192)
    linear = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192
    rest = 2 * 96 * 128 + 3 * 128
    head = output_heads(model)
    assert weights_bytes(model, FORMATS["bf16"], head) == 2 * (linear + rest)
    assert weights_bytes(model, FORMATS["int8"], head) == linear + 2 * rest
    assert weights_bytes(model, FORMATS["nf4"], head) == round(linear * 4.13 / 8) + 2 * rest
    everything = (*head, *linear_layers(model))
    assert weights_bytes(model, FORMATS["nf4"], everything) == 2 * (linear + rest)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_load_kwargs_match_their_own_config(name: str) -> None:
    written = FORMATS[name].load_kwargs(["lm_head"])["quantization_config"].to_dict()
    assert written["llm_int8_skip_modules"] == ["lm_head"]
    assert [form.name for form in FORMATS.values() if form.matches(written)] == [name]


def test_bf16_has_no_quantization_config() -> None:
    assert FORMATS["bf16"].load_kwargs([]) == {"dtype": torch.bfloat16}
    assert [form.name for form in FORMATS.values() if form.matches(None)] == ["bf16"]


def test_nf4_without_double_quantization_is_another_format() -> None:
    config = FORMATS["nf4"].load_kwargs([])["quantization_config"].to_dict()
    assert not FORMATS["nf4"].matches({**config, "bnb_4bit_use_double_quant": False})


@pytest.mark.parametrize("in_features", [64, 128])
def test_nf4_runs_every_size_that_it_takes(in_features: int) -> None:
    """The oracle of `fits`: the smallest layers it accepts give a finite, close product."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    dense = nn.Linear(in_features, 32, bias=False, dtype=torch.bfloat16)
    packed = Linear4bit(in_features, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    packed.load_state_dict(dense.state_dict())
    packed = packed.to("cpu").eval()
    x = torch.randn(1, in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        error = (packed(x) - dense(x)).float().norm() / dense(x).float().norm()
    assert 0.01 < error < 0.3  # 4 bits, and no structure to help them
