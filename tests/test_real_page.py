"""docs/real-models.md says what the results say; the amount that is measured fits what there is."""

import hashlib

import pytest

from kvcompress.evaluate.workloads import KNOWN
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.league.result import Cell, Conditions, League, Row
from kvcompress.tasks.stdlib_text import prose

ROLES = {
    "full cache": "reference",
    "planned": "planned",
    "h2o-lift": "published",
    "int8": "quantization",
    "fastgen T=0.95": "own",
}


def outcome(workload, hits, share, kl=None):
    return WorkloadOutcome(
        workload=workload,
        target=None,
        context_tokens=960,
        seed=0,
        hits=tuple(hits),
        output_tokens=(2,) * len(hits),
        answer_nats=tuple(2.0 - hit for hit in hits),
        kl_nats=kl,
        kv_bytes=round(share * 1e6),
        kv_bytes_bf16=1_000_000,
    )


@pytest.fixture(scope="module")
def league():
    cells = []
    for workload, full in (("symbols", 18), ("facts", 6)):
        for entry, right, share, point in (
            ("full cache", full, 1.0, None),
            ("planned", full - 1, 0.125, 0.125),
            ("h2o-lift", full - 5, 0.125, 0.125),
        ):
            hits = [1.0] * right + [0.0] * (20 - right)
            found = outcome(workload, hits, share)
            cells.append(Cell(entry=entry, workload=workload, point=point, outcome=found))
    for entry, share, kl in (
        ("full cache", 1.0, 0.0),
        ("int8", 0.5, 0.001),
        ("fastgen T=0.95", 0.4, 0.02),
    ):
        found = outcome("code", (1.0, 1.0), share, (kl, kl))
        cells.append(Cell(entry=entry, workload="code", point=None, outcome=found))
    return League(
        conditions=Conditions(
            date="2026-01-01",
            model="some-model",
            weights_hash="0" * 64,
            machine="a machine",
            device="cpu",
            dtype="float32",
            versions={"torch": "2"},
            context_tokens=960,
            samples=20,
            seed=0,
            storage="int8",
            lengths={},
            calibration="some",
            window_tokens=32,
            shared_windows=0,
        ),
        points=(0.125,),
        workloads=("symbols", "facts", "code"),
        rows=tuple(Row(name=n, role=role, description="") for n, role in ROLES.items()),
        cells=tuple(cells),
    )


def test_the_page_names_the_model_and_ranks_what_the_full_cache_can_do(benchmark, league, tmp_path):
    page = benchmark("pages.real_page")
    plain = {"symbols": {"package": {"nats": 0.5}, "plain": {"nats": 0.25, "kl_nats": 0.1}}}
    told = {"entry": "planned", "point": 0.125, "workloads": plain}
    league.save(tmp_path / "some-model.json", plain=told, texts={"prose": "abc"})
    page.write_page([tmp_path / "some-model.json"], tmp_path / "docs" / "real-models.md")
    text = (tmp_path / "docs" / "real-models.md").read_text()
    assert "### Verdicts, some-model" in text
    assert "| symbols | 20 | 90 % | 1.100 |  |" in text
    assert "| facts | 20 | 30 % | 1.700 | not ranked |" in text
    assert "**On the Pareto front: 1 of 1**" in text  # symbols alone
    assert "as the full cache itself scores below 60%: facts (30.0 %)." in text
    # 17 right of 20 against 13: 0.2 nats, and four of twenty samples differ
    assert "| symbols | 1/8 | 1.150 | h2o-lift 1.350 | -0.200 [" in text
    assert "| T=0.95 | 20.0 % | 0.400 | 0.0200 |" in text
    assert "| symbols | nats | 0.50000 | 0.25000 | +2.5e-01 |" in text
    assert (tmp_path / "docs" / "real-models" / "some-model" / "overview.svg").is_file()


def test_what_is_measured_is_known_and_fastgen_is_not_ranked(benchmark):
    real = benchmark("real")
    for amount in (real.WHOLE, real.QUICK):
        assert set(amount.workloads) <= set(KNOWN)
        entries, _ = real.entries_of(amount)
        names = {entry.name: entry.role for entry in entries}
        assert set(amount.entries) <= set(names) and names["full cache"] == "reference"
        assert [n for n, role in names.items() if role == "own"] == [
            f"fastgen T={target:g}" for target in amount.targets
        ]
        recipes = [entry.recipe for entry in entries if entry.recipe is not None]
        assert {recipe.calibration for recipe in recipes} == {amount.calibration}
    expected = hashlib.sha256(prose("evaluation").encode()).hexdigest()
    assert real.text_hashes()["prose"] == expected
