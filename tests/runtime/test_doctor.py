"""What `kvcompress doctor` says of this installation and of a plan."""

from __future__ import annotations

import json

import pytest
import torch

from kvcompress.bundle.read import plan_at
from kvcompress.cli.app import main
from kvcompress.kernels.available import TritonStatus, triton_status
from kvcompress.kernels.cpu import library as binding
from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.check import doctor
from tests.runtime.test_fused import plan_of


def by_part(found) -> dict[str, tuple[str, str | None]]:
    return {f.part: (f.found, f.why) for f in found}


def test_the_kernels_in_use_are_named():
    found = by_part(doctor.diagnose())["decoding on the CPU"]
    if binding.library() is None:
        assert found == ("tensor operations", binding.why_not())
    else:
        assert found[0] == f"compiled kernels, {binding.library().isa}"


def test_missing_kernels_say_why(monkeypatch):
    monkeypatch.setattr(doctor, "library", lambda: None)
    monkeypatch.setattr(doctor, "why_not", lambda: "the C kernels were not built: no compiler")
    found = by_part(doctor.diagnose())
    assert found["decoding on the CPU"] == (
        "tensor operations",
        "the C kernels were not built: no compiler",
    )


def test_a_gpu_without_triton_says_why(monkeypatch):
    found = by_part(doctor.diagnose())["decoding on a GPU"]
    status = triton_status("cuda")
    assert (found[1] is None) is status.usable
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = by_part(doctor.diagnose())["decoding on a GPU"]
    assert found[0] == "tensor operations" and "kvcompress[gpu]" in found[1]


def test_a_file_of_other_sources_is_not_used(tmp_path, monkeypatch):
    (tmp_path / f"_kernels{binding.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.setattr(binding, "_HERE", tmp_path)
    binding._found.cache_clear()
    try:
        assert binding.library() is None
        assert "cannot be loaded" in binding.why_not()
    finally:
        binding._found.cache_clear()


@pytest.mark.parametrize(
    ("change", "why"),
    [({}, None), ({"turn_tokens": 4}, "turn quotas"), ({"scorer": "vote"}, "the scorer 'vote'")],
)
def test_layers_of_a_plan(tmp_path, capsys, change, why):
    if binding.library() is None:
        why = binding.why_not()
    plan = plan_of([HeadPlan(frequent=Budget(tokens=8))], 16, **change)
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", str(tmp_path / "plan.json"), "--json"])
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["layer 0, full"] == {
        "part": "layer 0, full",
        "found": "compiled kernels" if why is None else "tensor operations",
        "why": why,
    }
    if why is None:  # and what is left to tensor operations all the same
        assert rows["these layers, too"]["why"].startswith("a cache with protected spans; a layer")
    assert ("these layers, too" in rows) == (why is None)


def test_layers_that_decode_alike_are_one_line():
    assert doctor._layers_named([3]) == "layer 3"
    assert doctor._layers_named([0, 1, 2, 5, 7, 8]) == "layers 0 to 2, 5, 7 to 8"
    one = plan_of([HeadPlan(frequent=Budget(tokens=8))], 16)
    kinds = {"layers": 4, "layer_kinds": ("full",) * 4, "sliding_windows": (None,) * 4}
    plan = one.model_copy(
        update={"model": one.model.model_copy(update=kinds), "heads": one.heads * 4}
    )
    of_one = [row.part for row in doctor._layers(plan, None) if row.part.startswith("layer")]
    assert of_one == ["layers 0 to 3, full"]


def test_a_gpu_is_asked_the_gate_of_its_kernels(monkeypatch):
    plan, part = plan_of([HeadPlan(frequent=Budget(tokens=8))], 16, scorer="vote"), "layer 0, full"
    there = TritonStatus("3.9", None)
    monkeypatch.setattr(doctor.triton_step, "triton_status", lambda device: there)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=has_gpu: found)
        rows = by_part(doctor._layers(plan, None))
        assert (f"{part}, static on a GPU" in rows) is has_gpu
    why = "the scorer 'vote' ranks otherwise"
    assert rows[f"{part}, static on a GPU"] == ("tensor operations", why)


def test_trained_scorers_need_the_bundle(tmp_path):
    plan = plan_of([HeadPlan(frequent=Budget(tokens=8))], 16, scorer="surrogate")
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    found = by_part(doctor.diagnose(*plan_at(tmp_path / "plan.json")))
    assert found["layers"][0] == "unknown" and "give the bundle" in found["layers"][1]
