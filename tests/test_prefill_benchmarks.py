"""The prefill benchmarks run, and count what they say they count, at a tiny size."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports scripts that lie outside the package, and forgets them again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_prefill_scores(benchmark, capsys):
    script = benchmark("prefill_scores")
    tiny = ["--query-heads", "4", "--kv-heads", "2", "--head-dim", "16", "--layers", "2"]
    script.main([*tiny, "--contexts", "150", "200", "--rounds", "3", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["conditions"]["kv_heads"] == 2
    assert [(r["level"], r["context_tokens"]) for r in told["rows"]] == [
        ("layer", 150), ("model", 150), ("layer", 200), ("model", 200)
    ]  # fmt: skip
    ways = {"plain", "float32 chunks", "one pass", "estimated", "last rows"}
    for row in told["rows"]:
        assert set(row["ms"]) == ways | ({"int8"} if row["level"] == "model" else set())
        assert row["ratio"]["plain"] == 1
        for name, each in row["all_ms"].items():
            assert len(each) == 3 and row["ms"][name] == pytest.approx(sorted(each)[1], abs=0.01)
            ratio = row["ms"][name] / row["ms"]["plain"]
            assert row["ratio"][name] == pytest.approx(ratio, rel=0.1)
    assert "| layer | 150 |" in script.table(told)
    assert importlib.import_module("kvcompress.runtime.layer.attention").attend_prompt.__name__ == (
        "attend_prompt"
    )


def test_what_is_timed_is_what_it_is_called(benchmark, monkeypatch):
    """Only the old way runs the float32 chunks, and all ways give one output."""
    import torch

    script = benchmark("prefill_scores")
    calls = []
    real = script.attend
    monkeypatch.setattr(script, "attend", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    told = ["--query-heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "float32"]
    args = script.arguments([*told, "--layers", "2"])
    expected = None
    for name, run in script.layer_runs(args, 90).items():
        calls.clear()
        out = run()
        assert bool(calls) == (name == script.OLD)
        expected = out if expected is None else expected
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for name, run in script.model_runs(args, 90).items():
        calls.clear()
        with torch.inference_mode():
            run()
        assert len(calls) == (2 if name == script.OLD else 0)


def test_peak_memory_says_what_is_beyond_the_claim(benchmark):
    script = benchmark("peak_memory")
    results = json.loads((BENCHMARKS / "results" / "peak_memory_cpu.json").read_text("utf-8"))
    assert [row["variant"] for row in results] == list(script.VARIANTS)
    named = {row["variant"]: row for row in results}
    no_cache, full = named[script.NO_CACHE], named[script.DYNAMIC]
    # keys and values of 12 layers, less the last token, which nobody reads again
    assert full["kv_bytes"] == pytest.approx(12 * full["layer_bytes"], rel=2e-3)
    assert abs(script.other_bytes(full, no_cache)) < 2 * script.MIB
    for name, row in named.items():
        other = script.other_bytes(row, no_cache)
        assert other < row["layer_bytes"], f"{name}: {other} bytes beside the claim"
    assert script.page_table(results) in (ROOT / "docs" / "cache.md").read_text("utf-8")
