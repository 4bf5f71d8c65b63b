"""docs/held-out.md says what the results say, and only that."""

import json

import pytest
import torch

from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.model.families import shape_of


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


def test_short_questions_have_a_table_of_their_own(rows):
    found = {"kl_nats": [0.1, 0.3], "last_nats": [0.2, 0.5], "kv_bytes": 1, "kv_bytes_bf16": 8}
    heads, every, planned = rows(
        {"answers|int8|builtin|16|2": found, "answers|ratio|builtin|16|4": found}
    )
    assert heads == ["budgets", "plan", "bytes held", "KL", "last quarter"]
    assert every[:2] == ["int8, every token", ""] and planned[:3] == ["`ratio`", "1/4", "0.125"]
    assert planned[3].startswith("0.2000 [") and planned[4] == "0.3500"


def test_an_answer_is_drawn_with_the_full_cache_and_fed_to_another(
    benchmark, tiny_llama, tiny_tokenizer, monkeypatch
):
    page = benchmark("held_out")
    monkeypatch.setattr(page, "ANSWER_TOKENS", 40)
    spoken = [page.answer(tiny_llama, tiny_tokenizer, question) for question in ("Who?", "Why so?")]
    prompt, said, wanted = spoken[1]
    ids = torch.tensor([[*prompt, *said[0].tolist()]])
    with torch.inference_mode():
        whole = tiny_llama(ids).logits[0].log_softmax(-1)
    assert said.shape == (1, 40)
    torch.testing.assert_close(wanted, whole[len(prompt) - 1 : -1], atol=1e-4, rtol=1e-4)
    shape = shape_of(tiny_llama.config, tiny_llama.dtype)
    every = uniform(shape, HeadPlan(full=True, k_dtype="model", v_dtype="model"))
    found = page.answers(tiny_llama, every, None, spoken)
    assert max(found["kl_nats"]) < 1e-6 and len(found["last_nats"]) == 2
    few = uniform(shape, HeadPlan(local=Budget(ratio=0.25)), sink_tokens=1, recent_tokens=2)
    squeezed = page.answers(tiny_llama, few, None, spoken)
    assert min(squeezed["kl_nats"]) > 1e-6 and squeezed["kv_bytes"] < found["kv_bytes"] / 2
