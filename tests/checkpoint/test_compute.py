"""The dtype that a model computes in: measured, and without a change to its weights or its plan."""

from __future__ import annotations

import time

import pytest
import torch

from kvcompress.checkpoint import compute
from kvcompress.checkpoint.compute import stored_dtype
from kvcompress.errors import UnsupportedModelError
from kvcompress.kernels.linear import speed
from kvcompress.kernels.linear.speed import compute_dtype
from kvcompress.profile.source import load_model, load_source, weights_hash
from kvcompress.runtime.model.families import shape_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def speeds(monkeypatch):
    """Sets the seconds of a product in each dtype."""

    def set_to(**seconds):
        monkeypatch.setattr(speed, "product_seconds", lambda dtype: seconds[str(dtype)[6:]])

    return set_to


def test_float32_only_where_16_bits_are_clearly_slower(speeds):
    speeds(float32=1.0, bfloat16=6.0, float16=1.4)
    assert compute_dtype("cpu", BF16) == FP32
    assert compute_dtype("cpu", FP16) == FP16, "a close call keeps what is stored"
    speeds(float32=1.0, bfloat16=0.2, float16=0.2)
    assert compute_dtype("cpu", BF16) == BF16


def test_other_devices_and_dtypes_are_not_measured(speeds):
    speeds()
    assert compute_dtype("cuda", BF16) == BF16
    assert compute_dtype(torch.device("cpu"), FP32) == FP32


def test_it_measures_this_machine_in_a_moment():
    speed.product_seconds.cache_clear()
    begun = time.process_time()
    found = compute_dtype("cpu", BF16)
    assert time.process_time() - begun < 1.0, "0.1 s on an idle core of AVX2"
    assert found in (BF16, FP32) and found == compute_dtype("cpu", BF16)


def test_a_conversion_keeps_weights_hash_and_stored_dtype(demo_model_dir, speeds):
    speeds(float32=1.0, bfloat16=6.0)
    stored, _ = load_source(str(demo_model_dir), "cpu")
    model, _ = load_source(str(demo_model_dir), "cpu", dtype="auto")
    assert (stored.dtype, model.dtype) == (BF16, FP32)
    assert stored_dtype(stored) == stored_dtype(model) == BF16
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored.get_parameter(name).float())
    assert weights_hash(model) == weights_hash(stored)
    shapes = [shape_of(m.config, stored_dtype(m)) for m in (stored, model)]
    assert shapes[0] == shapes[1] and shapes[1].model_dtype_bytes == 2
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-4  # no bfloat16 any more
    assert weights_hash(model) != weights_hash(stored)


def test_the_user_may_choose(demo_model_dir):
    assert load_model(str(demo_model_dir), "cpu").dtype == BF16
    for name in ("float32", "float16", "bfloat16"):
        assert load_model(str(demo_model_dir), "cpu", name).dtype == getattr(torch, name)


def test_auto_leaves_weights_that_would_fill_the_memory(demo_model_dir, speeds, monkeypatch):
    speeds(float32=1.0, bfloat16=6.0)
    monkeypatch.setattr(compute.os, "sysconf", lambda name: 1024)
    assert load_model(str(demo_model_dir), "cpu", "auto").dtype == BF16
    assert load_model(str(demo_model_dir), "cpu", "float32").dtype == FP32


def test_packed_weights_are_not_converted(speeds):
    class Packed(torch.nn.Linear):
        hf_quantizer = object()
        dtype, device = BF16, torch.device("cpu")

    model = Packed(2, 2)
    model.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    speeds(float32=1.0, bfloat16=6.0)
    assert compute.computing_in(model, "auto", "m") is model
    with pytest.raises(UnsupportedModelError, match="packed and compute in bfloat16"):
        compute.computing_in(model, "float32", "m")
