"""The scripts for a GPU run whole at tiny sizes on a CPU, so that a GPU's minutes are not lost."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kvcompress.kernels.tuning import lookup

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as the program that it is; gives what it wrote to stderr."""

    def run_(script, *arguments):
        path = ROOT / "benchmarks" / script
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().err

    yield run_
    sys.modules.pop("gpu", None)


def test_gpu(run, tmp_path):
    out = tmp_path / "gpu.json"
    run("gpu.py", out, "--dry")
    results = json.loads(out.read_text(encoding="utf-8"))
    rows = results["rows"]
    assert {row["section"] for row in rows} == {"copy", "split", "step", "model", "memory", "peers"}
    assert results["conditions"]["dry"] is True
    for row in rows:
        assert "not_run" not in row
        if not row.get("may_fail"):
            assert row["ms"] > 0, row
    models = {row["cache"]: row for row in rows if row["section"] == "model"}
    assert len(models) == 6
    for row in models.values():
        assert row["tokens_per_s"] > 0
        floor = (row["cache_bytes"] + row["weight_bytes"]) / rows[0]["GB_per_s"] / 1e6
        assert abs(row["floor_ms"] - floor) < 1e-9 * floor
    share = {name: row["cache_bytes"] for name, row in models.items()}
    assert share["ours int8 20%, CUDA graph"] < share["ours int8 100%, CUDA graph"] / 4
    larger = {row["cache"]: row["batch"] for row in rows if row["section"] == "memory"}
    assert larger["ours int8 20%, CUDA graph"] > larger["StaticCache, CUDA graph"]
    split = next(r for r in rows if r.get("storage") == "int8")
    # 2 rows, 2 heads, 40 tokens and a spare one: 32 codes, 2 scales, 2 minima, a position each
    assert split["bytes"] == (2 * 2 * 40 + 1) * (2 * (16 + 2 + 2) + 4)


def test_rows_say_why_they_were_not_measured(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    out = tmp_path / "gpu.json"

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    def broken():
        raise ImportError("no hqq here\nat all")

    late = gpu.Run(out, minutes=0.9, dry=True)
    late.row("model", 60, lambda: {"ms": 1.0}, cache="ours")
    late.row("model", 1, lambda: {"ms": 2.0}, cache="ours")
    late.row("model", 1, out_of_memory, cache="theirs")
    late.row("peers", 1, broken, cache="theirs", may_fail=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row.get("not_run") for row in rows] == ["out of time", None, "out of memory", None]
    assert [row.get("ms") for row in rows] == [None, 2.0, None, None]
    assert rows[3]["error"] == "ImportError: no hqq here"
    with pytest.raises(ImportError, match="no hqq here"):  # a dry run hides nothing of ours
        late.row("model", 1, broken, cache="ours")


def test_tuning(run, tmp_path):
    out = tmp_path / "table.json"
    shown = run("tune_triton.py", "--dry", "--out", out)
    table = json.loads(out.read_text(encoding="utf-8"))
    committed = ROOT / "kvcompress" / "kernels" / "tuning.json"
    before = json.loads(committed.read_text(encoding="utf-8"))
    assert "dry" not in before
    assert {k: v for k, v in table.items() if k != "dry"} == before
    for storage in ("int8", "int4", "fp8", "model"):
        config = lookup(table, "dry", f"{storage}/{storage}", 16)
        assert (config.tokens, config.warps) in ((32, 4), (64, 4))
        assert f"{storage} 16 ({config.tokens}, 4" in shown
