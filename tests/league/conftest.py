"""Made-up outcomes, and a league of a tiny model that runs in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.league.entries import Role, Skipped
from kvcompress.league.result import Cell, Conditions, League, Row
from kvcompress.league.work import Setup
from kvcompress.recipe import Calibration

FULL_BYTES = 1_000_000
MakeCell = Callable[..., Cell]
ROLES: dict[str, Role] = {
    "full cache": "reference",
    "ours": "planned",
    "ours tokens-only": "part",
    "ours bits-only": "part",
    "sink-recent": "baseline",
    "random": "baseline",
    "h2o": "published",
    "snapkv": "published",
    "int4": "quantization",
    "infllm": "recall",
}


SMALL = (
    ("windows", 2),
    ("continuation_tokens", 8),
    ("notes", 2),
    ("max_words", 1),
)


@contextmanager
def no_bar(label, total):
    yield lambda done: None


@pytest.fixture
def setup(tiny_model_dir: Path, tmp_path: Path) -> Setup:
    return Setup(
        model=str(tiny_model_dir),
        device="cpu",
        out=tmp_path / "out",
        workloads=("hidden",),
        samples=2,
        context_tokens=150,
        seed=0,
        calibration=Calibration(prompts=2, tokens=96),
        sizes=SMALL,
    )


def outcome(hits: Sequence[float], share: float, workload: str = "hidden") -> WorkloadOutcome:
    return WorkloadOutcome(
        workload=workload,
        target=None,
        context_tokens=960,
        seed=0,
        hits=tuple(hits),
        output_tokens=(5,) * len(hits),
        kv_bytes=round(share * FULL_BYTES),
        kv_bytes_bf16=FULL_BYTES,
        kl_nats=(0.25, 0.75),
    )


def right(count: int, of: int = 20) -> list[float]:
    """The first `count` answers right: two of these are paired as closely as can be."""
    return [1.0] * count + [0.0] * (of - count)


@pytest.fixture(scope="session")
def cell() -> MakeCell:
    """``cell(entry, point, hits, share)``; the share is the point's where it is left out."""

    def make(
        entry: str,
        point: float | None,
        hits: Sequence[float],
        share: float | None = None,
        workload: str = "hidden",
    ) -> Cell:
        held = share if share is not None else (1.0 if point is None else point)
        done = outcome(hits, held, workload)
        return Cell(entry=entry, workload=workload, point=point, outcome=done, seconds=1.5)

    return make


@pytest.fixture(scope="session")
def conditions() -> Conditions:
    return Conditions(
        date="2026-01-02",
        model="models/small",
        weights_hash="0123456789abcdef0123",
        machine="two cores",
        device="cpu",
        dtype="bfloat16",
        versions={"kvcompress": "0.1.0", "torch": "2.13.0"},
        context_tokens=960,
        samples=20,
        seed=0,
        storage="int8",
        lengths={"hidden": 960},
        calibration="builtin, 16 prompts of 1024 tokens",
        window_tokens=32,
        shared_windows=0,
        seconds=90.0,
    )


@pytest.fixture(scope="session")
def league(cell: MakeCell, conditions: Conditions) -> League:
    """Ours wins at 1/8 and loses at 1/16, where one part cannot go and one rival failed."""
    scores = {
        (1 / 8): {"ours": 19, "ours tokens-only": 12, "sink-recent": 5, "random": 2, "h2o": 9},
        (1 / 16): {"ours": 4, "ours tokens-only": 6, "sink-recent": 5, "random": 1, "h2o": 12},
    }
    cells = [cell("full cache", None, right(20)), cell("int4", None, right(18), 0.3)]
    for point, found in scores.items():
        cells += [cell(name, point, right(count)) for name, count in found.items()]
        bits = Cell(
            entry="ours bits-only",
            workload="hidden",
            point=point,
            error="too few",
            unreachable=True,
        )
        cells += [bits, Cell(entry="snapkv", workload="hidden", point=point, error="boom | bang")]
    rows = [Row(name=name, role=role, description=f"{name}.") for name, role in ROLES.items()]
    return League(
        conditions=conditions,
        points=(1 / 8, 1 / 16),
        workloads=("hidden",),
        rows=tuple(rows),
        cells=tuple(cells),
        skipped=(Skipped(name="nf4-int8", reason="same cache as int8"),),
    )


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with one trivial baseline and one evictor."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    small = "calibration: {prompts: 2, tokens: 96}\npolicy:\n  kind: uniform\n  head:\n"
    for name, head in (("sink-recent", "local: {ratio: 0.5}"), ("h2o", "frequent: {ratio: 0.2}")):
        text = f"name: {name}\n{small}    {head}\n    k_dtype: model\n    v_dtype: model\n"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder
