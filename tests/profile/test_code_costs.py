"""Costs of codes, from losses that are known."""

from io import StringIO

import pytest
from rich.console import Console

from kvcompress.plan import HeadPlan
from kvcompress.profile.code_costs import code_costs
from tests.profile.test_solve import NEEDS, hurt, profile_of

NEED = sum(map(sum, NEEDS))


def test_losses_of_keys_and_of_values_alone():
    costs = code_costs(profile_of())
    assert costs.codes == ("int8", "rot4", "rot3", "rot2")
    for code in costs.codes:
        one = hurt(HeadPlan(full=True, k_dtype=code, v_dtype="model"))
        for part in ("keys", "values"):
            assert costs.total(part, code) == pytest.approx(one * NEED)
    place = costs.codes.index("rot3")
    assert [layer["keys"][place] for layer in costs.layers] == [
        pytest.approx(0.03 * sum(layer)) for layer in NEEDS
    ]


def test_pairs_have_their_bits_and_advice_takes_the_fewest():
    costs = code_costs(profile_of())
    bits = {(k, v): bits for k, v, bits, _ in costs.pairs}
    # two float16 numbers for 64 codes of 8 bits, one for rotated ones, and a position for both
    assert bits["int8", "int8"] == 8 * (2 * (64 + 4) + 4) / 128
    assert bits["rot4", "rot3"] == 8 * (32 + 2 + 24 + 2 + 4) / 128
    losses = {(k, v): loss for k, v, _, loss in costs.pairs}
    assert losses["rot4", "rot2"] == pytest.approx(NEED * 0.108)
    assert any("in rot2, keys lose 1.0 times" in line for line in costs.advice())
    assert "in rot2, most is lost in layers 1" in costs.advice()
    assert not any("at most 0.01 nats" in line for line in costs.advice())  # all lose more
    few = profile_of()
    small = tuple(tuple(tuple(x / 1e4 for x in row) for row in layer) for layer in few.losses)
    costs = code_costs(few.model_copy(update={"losses": small}))
    (line,) = (line for line in costs.advice() if "at most 0.01 nats" in line)
    fit = [p for p in costs.pairs if p[3] <= 0.01]
    k, v, least, _ = min(fit, key=lambda pair: pair[2])
    assert f"{k} keys and {v} values" in line and f"{least:.2f} bits" in line


def test_a_table_for_terminals_and_facts_for_programs():
    costs = code_costs(profile_of())
    console = Console(width=160, record=True, file=StringIO())
    console.print(costs.table())
    text = console.export_text()
    assert "keys rot3" in text and "values rot2" in text and "all" in text
    facts = costs.facts()
    assert facts["layers"][1]["keys"]["rot4"] == pytest.approx(0.008 * sum(NEEDS[1]))


def test_profiles_without_these_losses_have_none():
    bare = profile_of().model_copy(update={"candidates": (HeadPlan(),), "losses": (((0.0,),),)})
    assert code_costs(bare) is None
