"""Bundles whose decoder layers have different weight formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvcompress
from kvcompress.bundle.write import export
from kvcompress.errors import BundleError
from kvcompress.kernels.cpu.library import library
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile
from kvcompress.recipe import WeightScheme
from tests.bundle.helpers import MIXED, Mixed


@pytest.mark.parametrize("weights", [MIXED, ("nf4", "bf16")])
def test_a_bundle_has_the_formats_and_bytes_of_its_plan(
    mixed: Mixed, measured: Path, weights: tuple[WeightScheme, ...]
) -> None:
    bundle, report = mixed(weights)
    planned = Profile.load(measured).planned_weight_bytes(weights)
    assert report.planned_bytes == report.tensor_bytes == planned
    bf16 = Profile.load(measured).weight_bytes["bf16"]
    assert planned < bf16 and report.weights_format == max(weights, key="bf16".__ne__)
    model, _ = kvcompress.load(bundle)
    for number, scheme in enumerate(weights):
        query = model.model.layers[number].self_attn.q_proj
        plain = {"bf16": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}
        served = {"bf16": "Linear16", "int8": "Int8Linear", "nf4": "Linear4bit"}
        assert type(query).__name__ == (plain if library() is None else served)[scheme]
    config = json.loads((bundle / "config.json").read_text())
    kept = config["quantization_config"]["llm_int8_skip_modules"]
    whole = weights.index("bf16")
    assert f"model.layers.{whole}.mlp.up_proj" in kept
    assert not [n for n in kept if f"layers.{1 - whole}.self_attn" in n]


def test_a_plan_with_formats_takes_no_other(
    tmp_path: Path, measured: Path, profile_dir: Path, model_dir: Path, plan: Plan
) -> None:
    mixed = plan.model_copy(update={"weights": MIXED})
    with pytest.raises(BundleError, match="leave --weights out"):
        export(model_dir, measured, tmp_path / "bundle", plan=mixed, weights="nf4")
    with pytest.raises(BundleError, match="which this profile did not measure"):
        export(model_dir, profile_dir, tmp_path / "bundle", plan=mixed)
