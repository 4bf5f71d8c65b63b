"""Figures follow from the raw windows, and files that are not results are refused."""

from __future__ import annotations

import pytest

from kvcompress.bench.result import Bandwidth, Cell, Missing, Result, Row, Timing, speedup, spread
from kvcompress.bench.run import conditions
from kvcompress.errors import KVCompressError


def timing(*wall: float, cpu: float = 1.0) -> Timing:
    return Timing(steps=2, wall_ms=wall, cpu_ms=tuple(cpu * x for x in wall))


def row(name: str, read_bytes: int | None, *wall: float) -> Row:
    return Row(
        name=name, kind="peer", context_tokens=64, batch=2, threads=1, weights="float32",
        fill="synthetic", timing=timing(*wall), kv_bytes=1, weights_bytes=2, read_bytes=read_bytes,
    )  # fmt: skip


def cell(*rows: Row) -> Cell:
    bandwidth = Bandwidth(
        threads=1, read_bytes=2_000_000, read=timing(0.1, 0.1), copied_bytes=4_000_000,
        copy=timing(0.4, 0.4),
    )  # fmt: skip
    return Cell(
        name="c", rounds=2, warm_rounds=1, load_before=(), load_after=(), seconds=1.0,
        bandwidths=(bandwidth,), rows=rows, missing=(Missing(name="x", reason="why"),),
    )  # fmt: skip


def test_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert timing(2.0, 4.0, cpu=0.5).cpu_per_wall == pytest.approx(0.5)


def test_a_speedup_is_taken_round_by_round():
    """Round by round 2, 4 and 2: their median is 2, the quotient of the medians would be 3."""
    found = speedup(timing(1.0, 2.0, 5.0), timing(2.0, 8.0, 10.0))
    assert found == (2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="2 and 1 rounds: not one run"):
        speedup(timing(1.0, 2.0), timing(1.0))


def test_the_floor_is_the_time_to_read_at_the_bandwidth_of_the_same_rounds():
    made = cell(row("a", 5_000_000, 1.0, 1.0), row("b", None, 1.0, 1.0))
    assert made.bandwidths[0].read_gb_s == pytest.approx(20.0)  # 2 MB in 0.1 ms
    assert made.bandwidths[0].copy_gb_s == pytest.approx(10.0)
    assert made.floor_ms(made.rows[0]) == pytest.approx(0.25)  # 5 MB at 20 GB/s
    assert made.floor_ms(made.rows[1]) is None
    assert made.row("a") is made.rows[0] and made.row("z") is None


def test_a_result_survives_its_file(tmp_path):
    result = Result(
        benchmark="decode", command="python x", date="2026-11-21",
        conditions=conditions("tiny", "cpu", "default"), cells=(cell(row("a", 5, 1.0, 2.0)),),
    )  # fmt: skip
    path = tmp_path / "r.json"
    path.write_text(result.to_json(), encoding="utf-8")
    assert Result.load(path) == result
    path.write_text(result.to_json().replace('"kind": "peer"', '"kind": "best"'), encoding="utf-8")
    with pytest.raises(KVCompressError, match=r"r.json: cells\[0\].rows\[0\].kind.*measure again"):
        Result.load(path)
