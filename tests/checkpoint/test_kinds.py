"""Every kind of model directory that is served: its logits, and what an export makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kvcompress.bundle import source
from kvcompress.bundle.source import Source
from kvcompress.checkpoint.load import find, load_config, load_model
from kvcompress.errors import BundleError, UnsupportedModelError
from kvcompress.profile.source import load_source, weights_hash
from kvcompress.quant.weights import FORMATS
from kvcompress.runtime.check.compare import distance, fixed_ids
from kvcompress.runtime.model.families import config_hash

FILE = "model.safetensors"
HEADS, KV_HEADS = 4, 2


def plain(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


def sharded(source: Path, to: Path) -> Path:
    plain(source, to)
    (to / FILE).unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(to, max_shard_size="100KB")
    assert len(list(to.glob("*.safetensors"))) > 2
    return to


def half(source: Path, to: Path) -> Path:
    plain(source, to)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).save_pretrained(to)
    return to


def packed_by_bitsandbytes(bits: int) -> Callable[[Path, Path], Path]:
    def make(source: Path, to: Path) -> Path:
        plain(source, to)
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(to)
        return to

    return make


def fp8(source: Path, to: Path) -> Path:
    """Blocks of 128 × 128 with a scale each, as published models have them."""
    plain(source, to)
    weights = load_file(to / FILE)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        scale = weights[name].abs().max().float() / 448
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[name + "_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, to / FILE, {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (to / "config.json").write_text(json.dumps(config))
    return to


# names of transformers and of llama.cpp
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf(source: Path, to: Path) -> Path:
    """As llama.cpp's converter writes it: Q8_0, query and key rows in its own order."""
    lib = pytest.importorskip("gguf")
    config = json.loads((source / "config.json").read_text())
    writer = lib.GGUFWriter(to.with_suffix(".gguf"), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    words = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.get))
    writer.add_token_scores([0.0] * len(words))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, weight in load_file(source / FILE).items():
        own = name.removesuffix(".weight").removeprefix("model.layers.")
        layer, _, inner = own.partition(".")
        called = f"blk.{layer}.{_NAMES[inner]}" if layer.isdigit() else _NAMES[own]
        array = weight.float().numpy()
        for end, heads in (("q_proj.weight", HEADS), ("k_proj.weight", KV_HEADS)):
            if name.endswith(end):
                split = array.reshape(heads, 2, len(array) // heads // 2, -1)
                array = split.swapaxes(1, 2).reshape(array.shape)
        kind = lib.GGMLQuantizationType.Q8_0
        if array.ndim == 1:
            writer.add_tensor(f"{called}.weight", np.ascontiguousarray(array))
        else:
            packed = lib.quants.quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(f"{called}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to.with_suffix(".gguf")


# how it is made; how far its logits lie from the plain model's; whether an export takes it
KINDS: dict[str, tuple[Callable[[Path, Path], Path], float, bool]] = {
    "plain": (plain, 0.0, True),
    "sharded": (sharded, 0.0, True),
    "float16": (half, 0.002, True),
    "bitsandbytes 8": (packed_by_bitsandbytes(8), 0.05, False),
    "bitsandbytes 4": (packed_by_bitsandbytes(4), 0.3, False),
    "fp8": (fp8, 0.1, True),
    "gguf": (gguf, 0.05, True),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Callable[[str], Path]:
    """The model of each kind. Read only."""
    folder, made = tmp_path_factory.mktemp("kinds"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = KINDS[name][0](tiny_model_dir, folder / name.replace(" ", "-"))
        return made[name]

    return get


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=fixed_ids(model, 32), use_cache=False).logits.float()


@pytest.mark.parametrize("name", KINDS)
def test_its_logits_are_those_of_the_model(name, kinds, tiny_model_dir):
    wanted = logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    model, tokenizer = load_source(str(kinds(name)), "cpu")
    assert tokenizer("abc").input_ids[-3:] == [67, 68, 69]
    error = distance(logits(model), wanted)
    assert error <= KINDS[name][1]
    assert (error == 0) == (KINDS[name][1] == 0), "it computed something else than the plain model"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind[2]])
def test_an_export_takes_what_is_in_16_bits_or_unpacked_to_it(name, kinds, tmp_path):
    found = source.find(kinds(name))
    profiled, _ = load_source(str(kinds(name)), "cpu")
    assert found.is_unpacked == (name in ("fp8", "gguf"))
    if found.is_unpacked:
        found = found.in_16_bits(tmp_path / "plain")
    own = found.load(None, dtype="auto")
    assert weights_hash(own) == weights_hash(profiled)
    assert config_hash(found.config) == config_hash(profiled.config)
    assert torch.equal(logits(own), logits(profiled))
    for scheme in ("int8", "nf4"):
        error = distance(logits(quantized(found, scheme)), logits(own))
        assert 0 < error < 0.3


def quantized(found: Source, scheme: str) -> torch.nn.Module:
    model: torch.nn.Module = found.load(None, **FORMATS[scheme].load_kwargs(("lm_head",)))
    return model


@pytest.mark.parametrize("name", ["fp8", "gguf"])
def test_what_was_unpacked_is_a_plain_directory(name, kinds, tmp_path):
    found = source.find(kinds(name))
    found.in_16_bits(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits(again), logits(load_source(str(kinds(name)), "cpu")[0]))
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["bitsandbytes 8", "bitsandbytes 4"])
def test_an_export_refuses_other_packed_weights_in_one_line(name, kinds):
    with pytest.raises(BundleError, match="quantized already; give the model in 16 or 32 bits, in"):
        source.find(kinds(name))


def test_a_tensor_type_that_is_not_served_is_named(kinds, tmp_path):
    lib = pytest.importorskip("gguf")
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(kinds("gguf"), broken)
    reader = lib.GGUFReader(broken, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    tensor.field.parts[4][0] = lib.GGMLQuantizationType.TQ1_0
    reader.data.flush()
    found = find(broken)
    with pytest.raises(UnsupportedModelError, match="TQ1_0") as caught:
        load_model(found, load_config(found))
    assert "\n" not in str(caught.value)
