"""Weights that are missing, too many, of another shape, or no numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kvcompress.checkpoint import load, packed, tensors
from kvcompress.checkpoint.load import find, load_config, load_model
from kvcompress.errors import UnsupportedModelError

FILE = "model.safetensors"
NAME = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A model directory to change."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def rewrite(model: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(model / FILE)
    change(weights)
    save_file(weights, model / FILE, {"format": "pt"})


def put(value: Any) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        weights[NAME][3, 5] = value

    return change


CHANGES: dict[str, tuple[Callable[[Weights], object], str]] = {
    "missing": (lambda w: w.pop(NAME), f"{NAME} is not among its weights"),
    "no layers": (
        lambda w: [w.pop(name) for name in list(w) if ".layers." in name],
        "layers.0.input_layernorm.weight is not among its weights",
    ),
    "shape": (lambda w: w.update({NAME: torch.zeros(4, 4)}), "cannot load the weights"),
    "nan": (put(math.nan), f"{NAME} holds NaN or infinite values"),
    "inf": (put(math.inf), f"{NAME} holds NaN or infinite values"),
    "minus inf": (put(-math.inf), f"{NAME} holds NaN or infinite values"),
    "huge": (put(-1e20), f"{NAME} holds 1e.20, and no weight is beyond 65504"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_refused(name: str, model_dir: Path) -> None:
    change, message = CHANGES[name]
    rewrite(model_dir, change)
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(found, load_config(found))


def test_tensors_that_the_model_lacks_are_refused_where_asked(model_dir: Path) -> None:
    rewrite(model_dir, lambda weights: weights.update(extra=torch.zeros(1)))
    found = find(model_dir)
    load_model(found, load_config(found))
    with pytest.raises(UnsupportedModelError, match="extra is not a tensor of the model"):
        load_model(found, load_config(found), exact=True)


@pytest.mark.parametrize("check", tensors.REPORT_CHECKS)
def test_every_list_of_the_report_is_needed(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {check: {"a.weight"}}
    with pytest.raises(UnsupportedModelError, match="m: a.weight "):
        tensors.check_report("m", report, exact=True)
    monkeypatch.delitem(tensors.REPORT_CHECKS, check)
    tensors.check_report("m", report, exact=True)


def test_a_truncated_file_is_refused(model_dir: Path) -> None:
    data = (model_dir / FILE).read_bytes()
    (model_dir / FILE).write_bytes(data[:-1])
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match="model.safetensors: not a whole safetensors"):
        load_model(found, load_config(found))


def test_memory_is_not_taken_for_weights_that_are_not_there(model_dir: Path) -> None:
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 2**16, "vocab_size": 2**20}))
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match=r"describes \d+ weights, and its files have"):
        load_model(found, load_config(found))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({"weight_map": {"a": "../out.safetensors"}}, "'../out.safetensors' is not the name"),
        ({"weight_map": {"a": "/out.safetensors"}}, "'/out.safetensors' is not the name"),
        ({"weight_map": {"a": "model.bin"}}, "'model.bin' is not the name of a safetensors file"),
        ({"weight_map": {"a": 3}}, "'3' is not the name"),
        ({"weight_map": {"a": "other.safetensors"}}, "other.safetensors is not there"),
    ],
)
def test_an_index_that_is_refused(index: Any, message: str, model_dir: Path) -> None:
    (model_dir / tensors.INDEX).write_text(json.dumps(index))
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(found, load_config(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_largest_finds_what_is_no_number(dtype: torch.dtype) -> None:
    value = torch.tensor([[1.0, -3.0], [0.5, 2.0]]).to(dtype)
    assert tensors.largest(value) == 3.0 and tensors.is_finite(value)
    for odd in (math.nan, math.inf, -math.inf):
        changed = value.float()
        changed[1, 0] = odd
        assert not tensors.is_finite(changed.to(dtype))
    assert tensors.largest(torch.ones(3, dtype=torch.int64)) == 0.0
    assert tensors.is_finite(torch.empty(0, dtype=dtype))


def test_a_generation_that_cannot_run_is_refused(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "output_hidden_states": ["x"]}))
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match="cannot load the"):
        load_model(found, load_config(found))


# ------------------------------------------------------------------------------ packed weights
def state(**changes: Any) -> SimpleNamespace:
    """What bitsandbytes knows of an nf4 layer of 8 rows and 64 columns."""
    inner = SimpleNamespace(blocksize=256, absmax=torch.ones(1), code=torch.zeros(256))
    whole = {
        "shape": (8, 64),
        "blocksize": 64,
        "absmax": torch.ones(8, dtype=torch.uint8),
        "code": torch.zeros(16),
        "nested": True,
        "offset": torch.tensor(0.5),
        "state2": inner,
    }
    return SimpleNamespace(**{**whole, **changes})


def inner(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(state().state2), **changes})


NF4 = {
    "state of another layer": ({"shape": (8, 32)}, "a state that is not that of a layer of"),
    "scales": ({"absmax": torch.ones(7, dtype=torch.uint8)}, "7 scales for 512 values in blocks"),
    "blocks": ({"blocksize": 3}, "blocks of no known size"),
    "table": ({"code": torch.zeros(1)}, "a table of 1 levels, not 16"),
    "table of nan": ({"code": torch.full((16,), math.nan)}, "a table that holds NaN"),
    "offset": ({"offset": torch.tensor(math.inf)}, "an offset that is not finite"),
    "no inner state": ({"state2": None}, "blocks of no known size"),
    "inner scales": ({"state2": inner(absmax=torch.ones(2))}, "2 scales for 8 values"),
    "inner nan": ({"state2": inner(absmax=torch.tensor([math.nan]))}, "scales that are negative"),
    "inner table": ({"state2": inner(code=torch.zeros(16))}, "a table of 16 levels, not 256"),
}


class Linear4bit(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"


class Linear8bitLt(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"


def layer(kind: type[nn.Linear], weight: Any) -> nn.Module:
    made = kind(64, 8, bias=False)
    del made.weight
    made.__dict__["weight"] = weight
    return nn.Sequential(made)


class Codes(torch.Tensor):
    """A tensor that knows its scales."""


def codes(size: tuple[int, ...], **known: Any) -> Codes:
    made = torch.zeros(size, dtype=torch.uint8).as_subclass(Codes)
    for name, value in known.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("name", NF4)
def test_packed_weights_of_four_bits(name: str) -> None:
    changes, message = NF4[name]
    packed.check_packed("m", layer(Linear4bit, codes((256, 1), quant_state=state())))
    with pytest.raises(UnsupportedModelError, match=f"m: 0: {message}"):
        packed.check_packed("m", layer(Linear4bit, codes((256, 1), quant_state=state(**changes))))


def test_packed_codes_of_four_bits() -> None:
    with pytest.raises(UnsupportedModelError, match="255 bytes of codes for 512 weights"):
        packed.check_packed("m", layer(Linear4bit, codes((255, 1), quant_state=state())))
    with pytest.raises(UnsupportedModelError, match="a state that is not that"):
        packed.check_packed("m", layer(Linear4bit, codes((256, 1))))


INT8 = {
    "rows": (codes((7, 64), SCB=torch.ones(8)), r"codes of shape \(7, 64\) for a layer of"),
    "no scales": (codes((8, 64), SCB=None), "not one scale for each of 8 rows"),
    "too few": (codes((8, 64), SCB=torch.ones(7)), "not one scale for each of 8 rows"),
    "nan": (codes((8, 64), SCB=torch.full((8,), math.nan)), "scales that are negative or not"),
    "below zero": (codes((8, 64), SCB=-torch.ones(8)), "scales that are negative or not finite"),
}


@pytest.mark.parametrize("name", INT8)
def test_packed_weights_of_eight_bits(name: str) -> None:
    weight, message = INT8[name]
    packed.check_packed("m", layer(Linear8bitLt, codes((8, 64), SCB=torch.ones(8))))
    with pytest.raises(UnsupportedModelError, match=f"m: 0: {message}"):
        packed.check_packed("m", layer(Linear8bitLt, weight))


# ---------------------------------------------------------------------------- other directories
def test_fp8_is_unpacked(model_dir: Path) -> None:
    """Blocks of 128 × 128 with a scale each, as published models have them."""
    whole = load_file(model_dir / FILE)

    def pack(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith("_proj.weight")]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[name + "_scale_inv"] = scale.float().reshape(1, 1)

    rewrite(model_dir, pack)
    path = model_dir / "config.json"
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**json.loads(path.read_text()), "quantization_config": quantized}
    path.write_text(json.dumps(config))
    found = find(model_dir)
    model = load_model(found, load_config(found))
    weight = dict(model.named_parameters())[NAME]
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    # e4m3 keeps three bits of the mantissa: half of the last one is 1/16
    torch.testing.assert_close(weight.float(), whole[NAME], rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_weights_that_another_package_reads_end_in_one_line(method: str, model_dir: Path) -> None:
    path = model_dir / "config.json"
    quantized = {"quant_method": method, "bits": 4, "group_size": 128}
    config = {**json.loads(path.read_text()), "quantization_config": quantized}
    path.write_text(json.dumps(config))
    found = find(model_dir)
    with pytest.raises(UnsupportedModelError, match=rf"weights, which {method} packed,") as caught:
        load_model(found, load_config(found))
    assert "\n" not in str(caught.value)


def test_a_gguf_file_needs_its_package(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model_dir / "tiny.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(load, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'kvcompress\[gguf\]'"):
        find(file)
    (model_dir / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"give a model directory or .*tiny\.gguf"):
        find(model_dir)


def test_a_damaged_gguf_file_ends_in_one_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda _: object())
    for content in (b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64):
        (model_dir / "tiny.gguf").write_bytes(content)
        found = find(model_dir / "tiny.gguf")
        with pytest.raises(UnsupportedModelError, match="cannot load the config.json"):
            load_config(found)
