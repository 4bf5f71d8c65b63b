"""The prefill benchmarks run, and count what they say they count, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


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
