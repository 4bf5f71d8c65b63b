"""The page says what the numbers say; pictures are made and read back."""

from __future__ import annotations

import json
import sys

import pytest

from kvcompress.errors import KVCompressError
from kvcompress.league.result import League, LeagueError, point_name
from kvcompress.league.verdicts import judge


@pytest.fixture(scope="module")
def script(benchmark):
    return benchmark("league_page")


@pytest.fixture(scope="module")
def render(script):
    return script.render


@pytest.fixture(scope="module")
def page(league, render):
    return render(league, judge(league), "league", notes="Because the notes say so.")


def test_the_page_says_where_ours_wins_and_loses(page):
    assert "**On the Pareto front: 1 of 2** (workload, byte point) pairs." in page
    assert "- hidden at 1/16: h2o is above ours, -40.0 points [" in page
    assert "Off the front, 1 of them clearly, zero outside of the interval:" in page
    assert "ours answers 95.0 % where the full cache answers 100.0 %, 0.950 of it, and so misses"
    assert "clearly ahead on 1 of 1." in page
    assert "| hidden | ours 95.0 % | h2o 45.0 % | +50.0 points [" in page
    assert "- hidden at 1/16: ours clearly loses to h2o, -40.0 points" in page
    assert (
        "labelled `baseline`, not above the best trivial one: hidden at 1/16 (sink-recent)" in page
    )
    assert "in 1 of 2 pairs, clearly above it in 1." in page
    assert "- hidden at 1/16: ours tokens-only is ahead, -10.0 points" in page
    assert "at least as good at 2 of 2 byte points" in page
    assert "in brackets: 1/8 0.5000 (0.5000), 1/16 0.5000 (0.5000)." in page
    assert "Because the notes say so." in page


def test_tables_have_every_cell(page):
    lines = page.splitlines()
    assert "| entry | 1/8 | 1/16 | its own bytes |" in lines
    assert "| ours bits-only | - | - |  |" in lines
    assert "| snapkv | failed | failed |  |" in lines
    assert any(line.startswith("| ours | **95.0** [") for line in lines)
    assert any(line.startswith("| int4 |  |  | 90.0 [") and "(0.300)" in line for line in lines)
    (ours,) = (line for line in lines if line.startswith("| ours | **95.0** ["))
    assert "| 20.0 b [" in ours
    assert "| h2o | 0.5000 | 0.5000 |  |" in lines  # KL


def test_predictions_of_plans_that_were_profiled_stand_beside_what_was_measured(league, render):
    cells = tuple(c.model_copy(update={"predicted_nats": 0.125}) for c in league.cells)
    told = league.model_copy(update={"cells": cells})
    lines = render(told, judge(told), "league").splitlines()
    assert "| ours | 1/8 | hidden | 0.1250 | 0.5000 [0.2500, 0.7500] |" in lines
    assert "| int4 | its own bytes | hidden | 0.1250 | 0.5000 [0.2500, 0.7500] |" in lines
    known = [line for line in lines if "| hidden | 0.1250 |" in line]
    assert not [line for line in known if line.startswith(("| h2o", "| random", "| sink"))]
    assert "## Predicted and measured" not in render(league, judge(league), "league")


def test_the_page_says_what_did_not_run_and_under_what_conditions(page):
    assert "- nf4-int8: same cache as int8" in page
    assert "- snapkv (hidden at 1/8, hidden at 1/16): failed: boom | bang" in page
    assert "- ours bits-only (hidden at 1/8, hidden at 1/16): no plan so small: too few" in page
    assert "- 2026-01-02; two cores; device cpu, dtype bfloat16; kvcompress 0.1.0, torch" in page
    assert "share no run of 32 tokens" in page
    assert "Of 10 cells at a target, 10 measured within 2% of it, 0 below and 0 above." in page


def test_cells_off_their_target_are_listed(league, cell, render):
    over = cell("h2o", 1 / 8, [1.0] * 20, share=0.15)
    cells = [over if (c.entry, c.point) == ("h2o", 1 / 8) else c for c in league.cells]
    changed = league.model_copy(update={"cells": tuple(cells)})
    page = render(changed, judge(changed), "league")
    assert "Furthest above, as a share of the target: h2o at 1/8 (1.20)." in page
    assert "| h2o | **100.0** [100, 100] (0.150) |" in page


def test_shared_text_is_not_hidden(league, render):
    told = league.conditions.model_copy(update={"shared_windows": 7, "other_code": 3})
    changed = league.model_copy(update={"conditions": told})
    page = render(changed, judge(changed), "league")
    assert "share 7 runs of 32 tokens" in page
    assert "3 cells were measured by an earlier state of the code" in page


def test_without_a_planned_entry_nothing_is_claimed(league, render):
    cells = tuple(c for c in league.cells if c.entry != "ours")
    changed = league.model_copy(update={"cells": cells})
    assert "No planned entry took part" in render(changed, judge(changed), "league")


def test_pictures_and_page_are_written_the_same_twice(league, script, tmp_path):
    first, second = tmp_path / "a" / "league.md", tmp_path / "b" / "league.md"
    for page in (first, second):
        page.parent.mkdir()
        script.write_pages(league, judge(league), page)
    names = {path.name for path in first.with_suffix("").iterdir()}
    assert names == {"hidden.png", "hidden.svg", "overview.png", "overview.svg"}
    for name in names:
        picture = first.with_suffix("") / name
        assert picture.stat().st_size > 5000
        assert picture.read_bytes() == (second.with_suffix("") / name).read_bytes()
    svg = (first.with_suffix("") / "hidden.svg").read_text(encoding="utf-8")
    for word in ("ours", "sink-recent", "full cache", "int4", "1/16"):
        assert word in svg
    assert "![hidden](league/hidden.png)" in first.read_text(encoding="utf-8")


def test_names_of_codes_take_the_lowest_free_level(benchmark):
    """A letter is 0.82 % of an axis from 1 to 100; a name of nine has the room of ten."""
    label_levels = benchmark("pages.league_plots").label_levels
    letter = 0.0082 * 2  # in decades
    names = [10**x for x in (0.5, 0.5, 0.5 + 9 * letter, 0.5 + 10 * letter, 1.9)]
    found = label_levels([(x, "nine-long") for x in names], 1.0, 100.0)
    assert found == [1, 2, 3, 1, 1]
    assert label_levels([(10**0.5, "a"), (10 ** (0.5 + 2.1 * letter), "b")], 1, 100) == [1, 1]
    assert label_levels([], 1.0, 100.0) == []


def test_a_missing_matplotlib_names_the_extra(league, script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KVCompressError, match=r"pip install 'kvcompress\[plots\]'"):
        script.write_pages(league, judge(league), tmp_path / "league.md")


def test_the_committed_page_is_what_the_results_say(script):
    results = script.ROOT / "benchmarks" / "results" / "league.json"
    league, notes = League.load(results), results.with_suffix(".notes.md")
    made = script.render(league, judge(league), "league", notes.read_text(encoding="utf-8"))
    assert made == (script.ROOT / "docs" / "league.md").read_text(encoding="utf-8")


def test_the_script_reads_a_league_and_its_notes(league, script, tmp_path, monkeypatch):
    data, page = tmp_path / "league.json", tmp_path / "docs" / "league.md"
    league.save(data)
    data.with_suffix(".notes.md").write_text("The reason is plain.", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["league_page.py", str(data), str(page)])
    script.main()
    assert "The reason is plain." in page.read_text(encoding="utf-8")


# ---- the value on disk
def test_a_league_is_read_as_it_was_written(league, tmp_path):
    path = tmp_path / "league.json"
    league.save(path, verdicts=judge(league).model_dump(mode="json"))
    assert League.load(path) == league
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["verdicts"]["points"][0]["planned"] == "ours"
    assert max(map(len, text.splitlines()[:20])) < 1500  # a cell on a line


def test_a_bad_league_is_refused(tmp_path):
    path = tmp_path / "league.json"
    with pytest.raises(LeagueError, match=r"cannot read the league .*; give a league\.json"):
        League.load(path)
    path.write_text('{"schema_version": 2}', encoding="utf-8")
    with pytest.raises(LeagueError, match=r"schema_version: .*; run the league again"):
        League.load(path)


def test_points_are_named_as_fractions():
    assert [point_name(p) for p in (0.5, 1 / 40, 0.3, None)] == [
        "1/2",
        "1/40",
        "0.3",
        "its own bytes",
    ]
