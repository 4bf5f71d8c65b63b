"""Every family greedily and under a mixed plan, every way of calling on three of them.

`make test-parity` measures all families in all ways.
"""

from __future__ import annotations

import pytest
import torch

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import uniform
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.runtime import battery, oracle, ways
from tests.runtime.battery import CASES, DRAFTED, FULL, Outcome, plan_for
from tests.runtime.models import FAMILIES, REFUSED, build, prompts, refused

# between them full, sliding and alternating layers, and a softcap
PLAIN = ("llama", "mistral", "gemma2")


def check(outcome: Outcome) -> None:
    assert outcome.passed, outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_v1_every_family(family):
    check(battery.measure_v1(family, "greedy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_v2_every_family(family):
    check(battery.measure_v2(family, "mixed"))


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("way", [way for way in ways.WAYS if way != "greedy"])
def test_v1_every_way(family, way):
    check(battery.measure_v1(family, way))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("llama", case) for case in CASES if case not in battery.KEEP_SETS or case == "cap"),
        ("mistral", "forwards"),
        ("llama4", "turns+protect"),
        ("gemma3n", "protect"),
        ("gpt_oss", "turns"),
        ("deepseek_v3", "turns+protect"),
        ("qwen3_next", "forwards"),
    ],
)
def test_v2_several_forwards(family, case):
    check(battery.measure_v2(family, case))


@pytest.mark.parametrize(("family", "name"), [("llama", "bfloat16"), ("gemma3n", "float16")])
def test_half_precision_costs_what_dynamic_cache_costs(family, name):
    check(battery.measure_dtype(family, name))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("way", DRAFTED)
def test_v7_a_draft_under_eviction_equals_plain_decoding(family, way):
    check(battery.measure_v7(family, way))


@pytest.mark.parametrize("family", ["gemma3n", "qwen3_next", "deepseek_v3"])
def test_v8_a_held_prompt_in_chunks_equals_one_shot(family):
    check(battery.measure_v8(family))


def test_drafts_of_a_model_with_a_state_are_refused_by_transformers():
    outcome = battery.measure_v1("qwen3_next", "assistant")
    assert outcome.passed and outcome.note.startswith("transformers refuses")


REASONS = {
    "falcon": "FalconForCausalLM: its attention bypasses",
    "gptj": "GPTJForCausalLM: its attention bypasses",
    "bloom": "BloomForCausalLM: its attention bypasses",
    "jetmoe": "changes keys after it stored them",
    "diffllama": "changes values after it stored them",
    "deepseek_v32": "evicting from it would change which tokens it selects",
    "glm_moe_dsa": "evicting from it would change which tokens it selects",
    "t5": "t5: an encoder-decoder model",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_be_served_wrongly_is_refused(name):
    model = refused(name)
    with pytest.raises(UnsupportedModelError, match=REASONS[name]), torch.no_grad():
        plan = uniform(shape_of(model.config, model.dtype), FULL)
        attach(model, plan)
        model(prompts(1, 12)["input_ids"], **as_argument(CompressedCache(plan)))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_look_at_few_tokens(family):
    """Under near-uniform attention no parity test would notice a mistake."""
    model = build(family)
    with torch.no_grad():
        found = model(prompts(2, 60)["input_ids"], output_attentions=True).attentions
    weights = [layer[:, :, -10:] for layer in found if layer is not None]
    assert weights
    for layer in weights:
        assert layer.amax(-1).mean() > 0.15  # 1/60 if uniform


def test_the_oracle_numbers_turns():
    assert oracle.turns([3, 1, 1, 2, 2, 1, 4]) == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


def test_the_oracle_keeps_what_the_rule_says():
    """One row of tokens 0 to 11: sinks 0 and 1, recent 10 and 11, so 2 to 9 are coded."""
    model = build("llama")
    special, punct = 40, 50
    ids = torch.tensor([[9, 9, punct, special, 9, 9, punct, 9, special, 9, 9, 9]])
    settings = {
        "sink_tokens": 2,
        "recent_tokens": 2,
        "special_ids": (special,),
        "punct_ids": (punct,),
    }

    def kept(protect=(), forwards=(12,), turn_tokens=0, **head) -> list[int]:
        plan = plan_for(
            model, battery.HeadPlan(**head, **battery.EXACT), turn_tokens=turn_tokens, **settings
        )
        found = oracle.Oracle(plan, ids, torch.ones_like(ids), protect)
        low = 0
        for length in forwards:
            found._take_keys(0, torch.ones(1, 2, length, 16), torch.ones(1, 2, length, 16), length)
            low += length
            for h in range(2):
                found.sums[0, 0, h] = torch.zeros(low, dtype=torch.float64)
            found._settle(0, 1)
        return sorted(p for p in found.kept[0, 0, 0] if 2 <= p <= 9)

    local = {"local": battery.Budget(tokens=4)}  # the two recent tokens, 9 and 8
    assert kept() == []
    assert kept(special=True) == [3, 8]
    assert kept(**local) == [8, 9]
    assert kept(special=True, punct=True) == [2, 3, 6, 8]
    # 8 is special and local: its class leaves room for one token by age
    assert kept(special=True, punct=True, **local) == [2, 3, 6, 7, 8, 9]
    assert kept(special=True, punct=True, cap=3, **local) == [3, 8, 9]
    assert kept(special=True, punct=True, cap=4, **local) == [3, 6, 8, 9]
    assert kept([(4, 6)]) == [4, 5]
    assert kept([(4, 6)], **local) == [4, 5, 8, 9]
    assert kept([[(4, 6)]], special=True, cap=1) == [4, 5, 8]
    # tokens 0 to 6 are the first turn: its newest two, and the newest two of the second
    two = {"forwards": (6, 1, 5), "local": battery.Budget(tokens=6)}
    assert kept(**two) == [6, 7, 8, 9]
    assert kept(**two, turn_tokens=2) == [5, 6, 8, 9]
    assert kept([(4, 5)], **two, turn_tokens=2) == [4, 5, 6, 8, 9]
