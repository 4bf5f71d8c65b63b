"""Verdicts on made-up numbers whose answers are plain."""

from __future__ import annotations

import pytest

from kvcompress.league.result import Cell
from kvcompress.league.verdicts import (
    Verdicts,
    best,
    fits,
    judge,
    judge_point,
    label_of,
    place_of,
    versus,
)
from tests.league.conftest import ROLES, right


def scattered(count: int, of: int = 20) -> list[float]:
    """`count` right answers, the last ones: pairs with `right` as loosely as can be."""
    return [0.0] * (of - count) + [1.0] * count


# ---- the Pareto front
def test_more_bytes_do_not_put_a_rival_above(cell):
    place, above = place_of(cell("ours", 1 / 8, right(10)), [cell("h2o", 1 / 4, right(15))])
    assert (place, above) == ("front", None)


def test_a_higher_score_in_equal_or_fewer_bytes_dominates(cell):
    ours = cell("ours", 1 / 8, right(10))
    for share in (0.05, 0.125, 0.1274):  # 0.1274 is within two per cent of 1/8
        place, above = place_of(ours, [cell("h2o", 1 / 8, right(11), share)])
        assert place == "dominated" and above is not None and above.entry == "h2o"
    assert place_of(ours, [cell("h2o", 1 / 8, right(11), 0.1277)]) == ("front", None)


def test_a_tie_at_equal_bytes_stays_on_the_front_and_in_fewer_bytes_is_said(cell):
    ours = cell("ours", 1 / 8, right(10))
    assert place_of(ours, [cell("h2o", 1 / 8, right(10))]) == ("front", None)
    assert place_of(ours, [cell("h2o", 1 / 8, right(10), 0.1230)]) == ("front", None)
    place, above = place_of(ours, [cell("h2o", 1 / 16, right(10))])
    assert place == "tied" and above is not None and above.point == 1 / 16


def test_the_best_has_the_highest_score_and_then_the_fewest_bytes(cell):
    cells = [cell("a", 1 / 2, right(9)), cell("b", 1 / 4, right(9)), cell("c", 1 / 8, right(8))]
    found = best(cells)
    assert found is not None and found.entry == "b"
    assert best([]) is None


def test_fitting_has_a_tolerance(cell):
    assert fits(cell("int4", None, right(1), 0.51), 0.5)
    assert not fits(cell("int4", None, right(1), 0.5101), 0.5)


# ---- labels
def test_labels_follow_the_mean_and_the_interval(cell):
    base = cell("sink-recent", 1 / 8, right(10))
    labels = {
        "same": right(10),
        "worse": right(9),
        "one more": right(11),
        "far above": right(18),
        "above but scattered": scattered(12),
    }
    found = {n: label_of(versus(cell("h2o", 1 / 8, hits), base)) for n, hits in labels.items()}
    assert found == {
        "same": "baseline",
        "worse": "baseline",
        "one more": "unclear",  # one pair of twenty: resamples without it are many
        "far above": "beats",
        "above but scattered": "unclear",
    }


def test_a_difference_is_paired(cell):
    against = versus(cell("ours", 1 / 8, right(12)), cell("h2o", 1 / 8, scattered(8)))
    assert against.difference == pytest.approx(0.2)
    assert against.interval[0] < -0.1 and against.interval[1] > 0.5  # no pair agrees
    assert not against.clear
    nested = versus(cell("ours", 1 / 8, right(12)), cell("h2o", 1 / 8, right(8)))
    assert nested.interval[0] > 0 and nested.clear


# ---- one point
def test_a_point_where_ours_wins(league):
    verdict = judge(league).points[0]
    assert (verdict.point, verdict.planned, verdict.baseline) == (1 / 8, "ours", "sink-recent")
    assert verdict.on_front and verdict.retained == pytest.approx(0.95)
    assert verdict.versus_published is not None
    assert verdict.versus_published.rival == "h2o"  # int4 has 0.3 of the bytes: it does not fit
    assert verdict.versus_published.difference == pytest.approx(0.5)
    assert verdict.versus_quantization is None
    assert verdict.versus_parts is not None
    assert verdict.versus_parts.rival == "ours tokens-only"
    assert {s.entry: s.label for s in verdict.standings} == {
        "ours": "beats",
        "ours tokens-only": "beats",
        "h2o": "beats",
        "sink-recent": None,
        "random": None,
    }


def test_a_point_where_ours_loses_is_labelled_so(league):
    verdict = judge(league).points[1]
    (own,) = (s for s in verdict.standings if s.entry == "ours")
    assert own.label == "baseline" and own.place == "dominated"
    assert own.above is not None and own.above.rival == "h2o"
    assert not verdict.on_front
    assert verdict.versus_parts is not None and verdict.versus_parts.difference < 0


def test_codes_of_every_token_are_rivals_where_they_fit(cell):
    cells = [
        cell("ours", 1 / 2, right(15)),
        cell("h2o", 1 / 2, right(12)),
        cell("int4", None, right(17), 0.3),
    ]
    verdict = judge_point(cells, ROLES, "hidden", 1 / 2)
    assert verdict.versus_published is not None and verdict.versus_published.rival == "int4"
    assert verdict.versus_quantization == verdict.versus_published
    assert verdict.reference is None and verdict.retained is None


def test_ours_at_other_sizes_and_our_parts_are_no_rivals_of_ours(cell):
    cells = [
        cell("ours", 1 / 8, right(10)),
        cell("ours", 1 / 16, right(12)),
        cell("ours tokens-only", 1 / 8, right(13)),
    ]
    verdict = judge_point(cells, ROLES, "hidden", 1 / 8)
    assert verdict.on_front
    (part,) = (s for s in verdict.standings if s.role == "part")
    assert part.place == "front"


def test_a_recall_tier_is_no_rival(cell):
    cells = [
        cell("ours", 1 / 8, right(10)),
        cell("infllm", None, right(20), share=0.05),
        cell("full cache", None, right(20)),
    ]
    verdict = judge_point(cells, ROLES, "hidden", 1 / 8)
    assert verdict.on_front and verdict.standings[0].place == "front"
    assert [s.entry for s in verdict.standings] == ["ours"]
    assert verdict.versus_published is None


def test_a_cell_above_its_target_is_said(cell):
    over = cell("h2o", 1 / 8, right(3), share=0.14)
    verdict = judge_point([over], ROLES, "hidden", 1 / 8)
    assert [s.in_budget for s in verdict.standings] == [False]
    assert verdict.planned == "" and verdict.versus_published is None


def test_a_full_cache_that_answers_nothing_has_no_share_to_keep(cell):
    cells = [cell("full cache", None, right(0)), cell("ours", 1 / 8, right(4))]
    verdict = judge_point(cells, ROLES, "hidden", 1 / 8)
    assert verdict.reference == 0.0 and verdict.retained is None


def test_failed_and_missing_cells_are_left_out(league):
    names = {s.entry for verdict in judge(league).points for s in verdict.standings}
    assert "snapkv" not in names and "ours bits-only" not in names
    empty = league.model_copy(update={"cells": ()})
    assert all(not verdict.standings for verdict in judge(empty).points)


def test_verdicts_are_data(league):
    verdicts = judge(league)
    assert Verdicts.model_validate_json(verdicts.model_dump_json()) == verdicts


def test_a_cell_without_an_outcome_is_a_cell():
    assert Cell(entry="a", workload="hidden", point=None, error="boom").outcome is None
