"""The comparison with kvpress: its page says what its results say, and its own side runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
# float32 sums in another order over four layers, in standard deviations of the logits
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def peers():
    """Imports the comparison's modules, which lie outside the package, and forgets them again."""
    sys.path.insert(0, str(PEERS))
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)
    sys.path.remove(str(PEERS))
    for name in set(sys.modules) - before:
        if str(PEERS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_say(peers, results):
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert peers("report").render(results) == page
    held = results["kvpress"]["chunked"]["Knorm"]["tokens"][0]
    assert f"asked for 512 tokens, holds {held}:" in page


def test_a_page_is_not_made_of_two_different_comparisons(peers, results):
    results = json.loads(json.dumps(results))
    results["kvpress"]["conditions"]["fingerprint"][0] += 0.01
    with pytest.raises(ValueError, match="the two sides ran other models or sizes"):
        peers("report").render(results)


def test_both_sides_measure_the_same_situations(peers, results):
    situations = set(peers("run").situations("kvcompress"))
    named = {name for name in results["kvpress"] if name != "conditions"} | {"versions"}
    assert situations == named == set(peers("rows").ROWS) | {"versions"}
    assert set(results["kvcompress"]) == set(results["kvpress"])


def test_the_reference_masks_exactly_what_was_dropped(peers):
    common = peers("common")
    model, ids = common.build(), common.token_ids(40)
    bounds = common.bounds_of(32, 8)
    plain = common.feed(model, common.DynamicCache(), ids, bounds)
    nothing = [None] * 2
    assert common.gap(common.reference(model, ids, bounds, nothing), plain) < ROUNDING
    kept = [torch.ones(1, 2, 32, dtype=torch.bool) for _ in range(common.LAYERS)]
    assert common.gap(common.reference(model, ids, bounds, [None, kept]), plain) < ROUNDING
    kept[2][0, 1, 30] = False
    assert common.gap(common.reference(model, ids, bounds, [None, kept]), plain) > 100 * ROUNDING
    assert common.share(kept) == 1 - 1 / (4 * 2 * 32)


def test_bytes_are_those_of_distinct_storages(peers):
    tensor = torch.zeros(8, 4)
    held = {"a": [tensor, tensor[2:]], "b": (torch.zeros(3, dtype=torch.int8), "text", None)}
    assert peers("common").storage_bytes(held) == 8 * 4 * 4 + 3


def run(peers, name):
    return peers("run").situations("kvcompress")[name](peers("common").SMALL)


@pytest.mark.parametrize(
    "name",
    ["per_layer", "long_generation", "interleaved", "reuse", "save_load", "eager", "positions"],
)
def test_situations_end_at_rounding(peers, name):
    for variant, record in run(peers, name).items():
        assert "error" not in record, variant
        assert record.get("gap", 0) < ROUNDING, variant


def test_families(peers, monkeypatch):
    common = peers("common")
    chosen = {name: common.FAMILIES[name] for name in ("qwen3_moe", "gpt_oss", "deepseek_v3")}
    monkeypatch.setattr(common, "FAMILIES", chosen)
    found = run(peers, "families")
    assert len(found) == 9
    for variant, record in found.items():
        assert record["gap"] < ROUNDING, variant
        assert record.get("agreement", 1) > 0.999, variant


def test_storage_is_freed(peers):
    for variant, record in run(peers, "storage").items():
        assert "error" not in record, variant
        # beyond what is kept: position and score (8 bytes beside 256), up to 32 free slots in a
        # head that keeps everything (one in each of 4 layers), layout and key constants
        kept_bytes = record["kept"] * record["full_bytes"] * (256 + 8) / 256
        assert record["bytes"] < kept_bytes + 4 * 32 * 264 + 8192, variant
        assert record["gap"] < ROUNDING or ", int" in variant, variant


def test_padding_and_chunks(peers):
    for variant, record in run(peers, "padding").items():
        assert record["pad_share"] == [0, 0], variant
        gaps = ("short_row_gap", "long_row_gap", "generate_gap")
        assert all(record[gap] < ROUNDING for gap in gaps), variant
    for variant, record in run(peers, "chunked").items():
        assert set(record["tokens"]) == {record["asked"]}, variant
        assert record["gap" if "per_chunk" in variant else "gap_to_one_shot"] < ROUNDING, variant


def test_what_stays_is_not_touched(peers):
    for variant, record in run(peers, "intact").items():
        assert record["changed"] == 0, variant
        assert 0 < record["evicted"] < 0.05, variant
