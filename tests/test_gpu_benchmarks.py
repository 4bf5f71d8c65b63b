"""The scripts for a GPU run whole at tiny sizes on a CPU, so that a GPU's minutes are not lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kvcompress.kernels.tuning import lookup

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_gpu(tmp_path):
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


def test_a_run_without_time_says_what_it_left_out(tmp_path):
    out = tmp_path / "gpu.json"
    run("gpu.py", out, "--dry", "--minutes", "0.2")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows[0]["section"] == "copy"
    skipped = [row for row in rows if row.get("not_run") == "out of time"]
    assert {row["section"] for row in skipped} >= {"split", "model"}


def test_tuning(tmp_path):
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
