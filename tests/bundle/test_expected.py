"""The check of a written bundle: each wrong part is named, and a noisy model is no fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcompress.bundle import manifest
from kvcompress.bundle.expected import Expected
from kvcompress.bundle.read import load_weights, open_bundle
from kvcompress.bundle.verify import check_logits, verify
from kvcompress.errors import BundleError, UnsupportedModelError
from kvcompress.plan import HeadPlan, uniform
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.check import compare
from kvcompress.runtime.check.compare import allowed, distance, fixed_ids, tolerance
from kvcompress.runtime.check.stored import listen, stored_problem
from kvcompress.runtime.hf.attach import attach, attending_with, detach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.bundle.helpers import Exported, edit_json, relist

UP = "model.layers.{}.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the bundle of a weight format, to damage."""
    return lambda weights: Path(shutil.copytree(exported(weights)[0], tmp_path / "bundle"))


def wanted(path: Path) -> Path:
    """What the export of this bundle expected."""
    opened = open_bundle(path)
    model = load_weights(opened)
    file = path.parent / "expected.safetensors"
    params = path / manifest.PARAMS
    Expected.of(check_logits(model), model, opened.plan, params).save(file)
    return file


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, told)


def one_weight(tensors: Tensors) -> None:
    """The smallest change that there is: one number."""
    name = UP.format(1)
    flat = tensors[name].view(-1)
    flat[7] = flat[7] + 1 if flat.dtype in (torch.int8, torch.uint8) else flat[7] * 1.01


def two_layers(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".layers.0." in n]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()


def one_constant(tensors: Tensors) -> None:
    tensors["layers.0.k_center"][1, 3] += 1e-3


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("change", [one_weight, two_layers])
def test_wrong_weights_are_named(bundle, weights, change):
    path = bundle(weights)
    told = wanted(path)
    assert verify(path, told).reload_error == 0
    rewrite(path / "model.safetensors", change)
    relist(path)
    with pytest.raises(BundleError, match=r"not those that were saved: model\.layers\.[01]"):
        verify(path, told)


def test_a_wrong_key_constant_is_named(bundle):
    path = bundle("bf16")
    told = wanted(path)
    rewrite(path / manifest.PARAMS, one_constant)
    relist(path)
    with pytest.raises(BundleError, match="kv_params.safetensors: not what the export was to"):
        verify(path, told)


def test_an_altered_plan_is_named(bundle):
    path = bundle("bf16")
    told = wanted(path)
    edit_json(path / manifest.PLAN, max_position=511)
    relist(path)
    with pytest.raises(BundleError, match="plan.json: not what the export was to write"):
        verify(path, told)


# ------------------------------------------------------------------------------------------- noise
def sharpen(weights: Tensors) -> None:
    """Attention scores beyond 100, which one kernel rounds to bfloat16 and the other does not."""
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight", "o_proj.weight")):
            weights[name] = weights[name] * 60


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        ids = fixed_ids(model, 48)
        return model(input_ids=ids, use_cache=False).logits[0].float()


def test_the_bar_is_the_models_own_noise(exported):
    model = load_weights(open_bundle(exported("bf16")[0]))
    assert allowed(model, lambda: logits(model)) == tolerance(torch.bfloat16)
    weights = dict(model.named_parameters())
    sharpen(weights)
    model.load_state_dict(weights, strict=False)
    found = []
    for kernel in ("eager", "sdpa"):
        with attending_with(model, kernel):
            found.append(logits(model))
    apart = distance(found[0], found[1])
    assert apart > tolerance(torch.bfloat16), "this model is noisier than the fixed bar"
    assert allowed(model, lambda: logits(model)) == 3 * apart
    assert torch.equal(logits(model), found[1]), "its own kernel is back"


def test_a_noisy_but_right_model_passes(bundle):
    path = bundle("bf16")
    rewrite(path / "model.safetensors", sharpen)
    relist(path)
    report = verify(path, wanted(path))
    assert report.allowed_error > 0.05 and report.reload_error == 0
    assert report.lossless_error <= report.allowed_error


def test_a_model_with_one_kernel_has_the_fixed_bar(tiny_llama, monkeypatch):
    def refuse(kernel):
        raise ValueError(f"no {kernel}")

    monkeypatch.setattr(tiny_llama, "set_attn_implementation", refuse)
    with pytest.raises(UnsupportedModelError, match="no eager attention"):
        with attending_with(tiny_llama, "eager"):
            pass
    assert allowed(tiny_llama, lambda: torch.zeros(1)) == compare.tolerance(torch.float32)


# ------------------------------------------------------------------------------------------ stored
STORED = ["model", "int8", "fp8", "int4"]


def read(model, dtype):
    """A compressed cache of one prompt, and what it was given."""
    head = HeadPlan(full=True, k_dtype=dtype, v_dtype=dtype)
    plan = uniform(shape_of(model.config, model.dtype), head, recent_tokens=8)
    attach(model, plan)
    cache = new_cache(model)
    given = listen(cache)
    with torch.inference_mode():
        model(input_ids=fixed_ids(model, 64), **as_argument(cache), use_cache=True)
    detach(model)
    return cache, given


@pytest.mark.parametrize("dtype", STORED)
def test_stored_keys_and_values_are_held_to_their_code(dtype, tiny_llama):
    cache, given = read(tiny_llama, dtype)
    assert sorted(given) == [0, 1] and given[0][0].shape == (1, 2, 64, 16)
    assert stored_problem(cache, given) is None
    assert "nothing can be compared" in stored_problem(cache, {})


def swap_layers(given):
    return {0: given[1], 1: given[0]}


def swap_heads(given):
    return {**given, 1: (given[1][0].flip(1), given[1][1])}


def shift_tokens(given):
    return {**given, 1: (given[1][0], given[1][1].roll(1, dims=2))}


WRONG = {"layer 0 stores keys": swap_layers, "layer 1 stores keys": swap_heads}
WRONG["layer 1 stores values"] = shift_tokens


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("told", WRONG)
def test_what_lies_elsewhere_is_named(told, dtype, tiny_llama):
    cache, given = read(tiny_llama, dtype)
    assert stored_problem(cache, WRONG[told](given)).startswith(told)


def test_other_key_constants_than_those_of_the_codes_are_noticed(tiny_llama):
    cache, given = read(tiny_llama, "int8")
    state = cache.layers[1].state
    center, scale = state.key_constants()
    state.settings._constants[torch.device("cpu"), state.positions] = (center, 1.5 * scale)
    assert "layer 1 stores keys in int8" in stored_problem(cache, given)
