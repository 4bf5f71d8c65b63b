"""Plans: JSON in and out, errors with key paths, and budgets that only grow."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvcompress.errors import PlanError
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, uniform

SHAPE = ModelShape(
    model_type="llama",
    config_hash="0" * 64,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    sliding_windows=(None, 32),
    max_position=128,
)
HEADS = (
    HeadPlan(full=True, k_dtype="model", v_dtype="model"),
    HeadPlan(),
    HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.3), k_dtype="int8", v_dtype="int4"),
    HeadPlan(local=Budget(ratio=0.25, min_tokens=8, max_tokens=64), k_dtype="fp8", v_dtype="fp8"),
)
PLAN = Plan(
    model=SHAPE,
    heads=(HEADS[:2], HEADS[2:]),
    special_ids=(0, 1),
    punct_ids=(5,),
    special_share=0.01,
    punct_share=0.1,
    tokenizer_hash="abc",
    max_position=128,
    target="fastgen T=0.95",
    predicted_loss=0.5,
)


def test_json_round_trip():
    assert Plan.from_json(PLAN.to_json()) == PLAN


@pytest.mark.parametrize("inside", ["plan.json", "kvcompress/plan.json"])
def test_load_finds_the_plan_of_a_profile_or_a_bundle(tmp_path, inside):
    path = tmp_path / inside
    path.parent.mkdir(exist_ok=True)
    path.write_text(PLAN.to_json(), encoding="utf-8")
    assert Plan.load(path) == PLAN
    assert Plan.load(tmp_path) == PLAN


def test_a_missing_plan_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="cannot read the plan .*; give a plan.json"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("schema_version",), 2, r"plan\.json: schema_version: .*\(got 2\)"),
        (("colour",), "red", "colour: unknown key"),
        (("sink_tokens",), -1, "sink_tokens: .*greater than or equal to 0"),
        (("sink_tokens",), "4", "sink_tokens: .*valid integer"),
        (("recent_tokens",), 0, "recent_tokens: .*greater than 0"),
        (("scorer",), "best", "scorer: "),
        (("heads", 1, 0, "k_dtype"), "int3", r"heads\[1\]\[0\]\.k_dtype: .*\(got 'int3'\)"),
        (("heads", 1, 0, "keep"), 3, r"heads\[1\]\[0\]\.keep: unknown key"),
        (("heads", 0, 0, "punct"), True, r"heads\[0\]\[0\]: a full head keeps everything"),
        (("heads", 1, 0, "frequent", "tokens"), 4, r"heads\[1\]\[0\]\.frequent: give exactly one"),
        (("model", "layers"), 3, "model: sliding_windows needs one entry for each of 3 layers"),
        (
            ("model", "kv_heads"),
            4,
            r"heads\[0\] has 2 heads, the model stores 4 KV heads in that layer",
        ),
        (("model", "sliding_windows"), [None], "sliding_windows needs one entry for each of 2"),
        (("special_share",), 1.5, "special_share: "),
    ],
)
def test_schema_errors_name_the_key_and_the_file(path, value, reason):
    data = json.loads(PLAN.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PlanError, match=reason) as caught:
        Plan.from_json(json.dumps(data), "plan.json")
    assert "\n" not in str(caught.value)


def test_all_errors_of_a_plan_come_together():
    data = json.loads(PLAN.to_json())
    data["scorer"], data["heads"][0][1]["v_dtype"] = "best", "int3"
    with pytest.raises(PlanError, match=r"heads\[0\]\[1\]\.v_dtype.*scorer"):
        Plan.from_json(json.dumps(data))


def test_text_that_is_not_json_is_a_plan_error():
    with pytest.raises(PlanError, match="plan: .*JSON"):
        Plan.from_json('{"model": ')


def test_plans_are_values():
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.sink_tokens = 8  # type: ignore[misc]
    assert hash(HEADS[0]) == hash(HeadPlan(full=True, k_dtype="model", v_dtype="model"))


@pytest.mark.parametrize(
    ("budget", "length_tokens", "tokens"),
    [
        (Budget(tokens=7), 3, 7),
        (Budget(tokens=0), 100, 0),
        (Budget(ratio=0.3), 10, 3),
        (Budget(ratio=0.25), 10, 3),  # 2.5 rounds up: a budget never loses a token to rounding
        (Budget(ratio=0.1, min_tokens=8), 10, 8),
        (Budget(ratio=0.5, max_tokens=4), 100, 4),
        (Budget(ratio=1.0), 17, 17),
    ],
)
def test_budget_resolves_to(budget, length_tokens, tokens):
    assert budget.resolve(length_tokens) == tokens


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokens": 1, "ratio": 0.5},
        {"tokens": 1, "max_tokens": 4},
        {"tokens": -1},
        {"ratio": 0.0},
        {"ratio": 1.01},
        {"ratio": 0.5, "min_tokens": 8, "max_tokens": 4},
    ],
)
def test_budgets_that_are_refused(settings):
    with pytest.raises(
        ValidationError, match="exactly one|bound a ratio|greater than|less than|is below"
    ):
        Budget(**settings)


ratios = st.floats(min_value=1e-6, max_value=1.0)
lengths = st.integers(min_value=0, max_value=1_000_000)


@given(ratios, ratios, lengths, lengths)
def test_a_budget_grows_with_its_ratio_and_with_the_row(r, s, n, m):
    low, high = sorted((r, s))
    short, long = sorted((n, m))
    assert Budget(ratio=low).resolve(short) <= Budget(ratio=high).resolve(short)
    assert Budget(ratio=low).resolve(short) <= Budget(ratio=low).resolve(long)


@given(ratios, lengths, st.integers(0, 5000), st.integers(0, 5000))
def test_a_budget_grows_with_its_lower_bound_and_its_upper_bound(ratio, length, a, b):
    low, high = sorted((a, b))
    at_low = Budget(ratio=ratio, min_tokens=low).resolve(length)
    assert low <= at_low <= Budget(ratio=ratio, min_tokens=high).resolve(length)
    capped = Budget(ratio=ratio, max_tokens=low + 1).resolve(length)
    assert capped <= min(low + 1, Budget(ratio=ratio, max_tokens=high + 1).resolve(length))


def test_labels_for_tables():
    assert [head.label for head in HEADS] == [
        "full",
        "sink+recent",
        "special+punct+frequent 0.3",
        "local 0.25",
    ]
    assert [head.storage for head in HEADS] == ["model", "int8", "k8v4", "fp8"]
    assert HeadPlan(local=Budget(tokens=64)).label == "local 64t"


def test_bf16_bytes_respect_the_models_own_windows():
    per_token = 2 * 2 * 8 * 2  # keys and values, KV heads, head_dim, two bytes
    assert SHAPE.bf16_kv_bytes(100, 3) == 3 * per_token * (100 + 32)
    assert SHAPE.bf16_kv_bytes(10, 1) == per_token * 20


def test_uniform_gives_every_head_the_same():
    plan = uniform(SHAPE, HEADS[0], sink_tokens=2)
    assert plan.heads == ((HEADS[0],) * 2,) * 2
    assert (plan.sink_tokens, plan.max_position) == (2, SHAPE.max_position)
