"""The side-by-side pages say what their results say, and the results hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def cells_of(name: str) -> dict:
    text = (BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)["cells"]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_heavy_hitter_page_shows_the_results(benchmark):
    script, cells = benchmark("heavy_hitters"), cells_of("heavy_hitters")
    assert script.table(cells) in page("heavy-hitters")
    assert script.depth_table(cells) in page("heavy-hitters")


def test_the_heavy_hitter_page_shows_what_estimates_keep(benchmark):
    script, cells = benchmark("estimated_sums"), cells_of("estimated_sums")
    assert script.agreement_table(cells) in page("heavy-hitters")
    assert script.quality_table(cells) in page("heavy-hitters")
    score_queries = (script.EXACT, *script.ESTIMATES, *script.WINDOWS)
    plans = [f"{kind} 1/{share}" for kind in ("planned", "h2o-lift") for share in script.SHARES]
    for name in (
        f"{p} {w}: {script.named(v)}"
        for p in plans
        for w in script.WORKLOADS
        for v in score_queries
    ):
        assert len(cells[name]["answer_kl"]) == 96, name


def test_plans_with_estimates_hold_the_bytes_of_those_without(benchmark):
    script, cells = benchmark("estimated_sums"), cells_of("estimated_sums")
    for name, cell in cells.items():
        if name == "agreement":
            continue
        exact = cells[f"{name.partition(':')[0]}: {script.named(script.EXACT)}"]
        assert 0.99 < cell["kv_bytes"] / exact["kv_bytes"] < 1.005, name


def test_the_fastgen_page_shows_the_results(benchmark):
    assert benchmark("fastgen").table(cells_of("fastgen")) in page("fastgen")


def test_heavy_hitters_were_compared_at_equal_bytes(benchmark):
    script, cells = benchmark("heavy_hitters"), cells_of("heavy_hitters")
    for share in script.RATIOS:
        own = [cells[f"1/{share} {script.label(*way)}"] for way in script.ways(share)]
        sizes = [cell["kv_bytes"] for cell in own]
        assert all(cell["kv_bytes"] == cell["kv_bytes_accounted"] for cell in own)
        assert max(cell["kv_ratio"] for cell in own) <= 1 / share
        assert min(sizes) > 0.99 * max(sizes)
        assert {len(cell["hidden"]) for cell in own} == {96}


def test_the_closed_form_of_uniform_attention(benchmark):
    """Sums of 1 / q over the rows that see a token, straight from the definition."""
    lines = benchmark("heavy_hitters").uniform_attention(80)
    raw = [sum(1 / (q + 1) for q in range(i, 80)) for i in range(0, 80, 2)]
    assert lines["raw"] == pytest.approx(raw, abs=1e-5)
    mean = [value / (80 - 2 * place) for place, value in enumerate(raw)]
    assert lines["mean"] == pytest.approx(mean, abs=1e-5)
    assert lines["lift"] == [1.0] * 40


def test_both_readings_of_the_recovery_chose_the_same():
    assert all(cells_of("fastgen")["readings agree"].values())


def test_a_higher_target_never_kept_less():
    """Of every prompt and head, static and per request."""
    cells = cells_of("fastgen")
    for kind in ("static", "per request"):
        names = sorted(name for name in cells if name.startswith(f"requests: {kind} "))
        flat = [
            [place for prompt in cells[name]["places"] for layer in prompt for place in layer]
            for name in names
        ]
        for low, high in zip(flat, flat[1:], strict=False):
            assert all(a <= b for a, b in zip(low, high, strict=True))
