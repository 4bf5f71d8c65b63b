"""docs/held-out.md says what the results say, and only that."""

import json

import pytest


def cell(**found):
    usual = {"predicted": 0.02, "predicted_recall": 0.1, "hits": None}
    return {**usual, "kl_nats": None, "answer_nats": [], **found}


@pytest.fixture
def rows(benchmark, tmp_path):
    """Cells of the page's tables, by what stands in front of the numbers."""

    def of(cells):
        path = tmp_path / "some.json"
        path.write_text(json.dumps({"conditions": {"model": "some"}, "cells": cells}))
        lines = benchmark("held_out").page([path]).splitlines()
        split = [[part.strip() for part in line.strip("| ").split("|")] for line in lines]
        return [row for row in split if len(row) > 3 and not row[0].startswith("-")]

    return of


def test_measured_means_stand_beside_the_predicted_ones(rows):
    heads, first, second = rows(
        {
            "prose|2048|builtin|16|8": cell(kl_nats=[0.01, 0.03]),
            "code|2048|builtin|16|8": cell(kl_nats=[0.01, 0.01]),
            "prose|2048|prose|16|8": cell(kl_nats=[0.04, 0.04], predicted_recall=None),
        }
    )
    assert heads[5:] == ["KL, prose", "KL, code", "predicted / measured"]
    assert first[:5] == ["builtin", "16", "1/8", "0.0200", "0.1000"]
    assert first[5].startswith("0.0200 [") and first[6] == "0.0100 [0.0100, 0.0100]"
    assert first[7] == "1.00, 2.00"
    assert second[:5] == ["prose", "16", "1/8", "0.0200", ""] and second[6:] == ["", "0.50"]


def test_questions_the_full_cache_cannot_answer_are_not_ranked(rows):
    heads, full, planned = rows(
        {
            "symbols|960|full|0|1": cell(hits="1110", answer_nats=[0.5] * 4),
            "symbols|960|builtin|16|4": cell(hits="1010", answer_nats=[0.7] * 4),
            "facts|960|full|0|1": cell(hits="1000", answer_nats=[1.5] * 4),
        }
    )
    assert heads[3:] == ["symbols right", "symbols, nats", "facts right, not ranked", "facts, nats"]
    assert full[:4] == ["full", "", "", "75 %"] and full[5] == "25 %"
    assert planned[:4] == ["builtin", "16", "1/4", "50 %"] and planned[4].startswith("0.700 [")
