import json

import pytest

from kvcompress.cli.app import main
from kvcompress.errors import PlanError
from kvcompress.evaluate.compare import Row, compare, plan_row
from kvcompress.evaluate.suite import make_suite
from kvcompress.plan import HeadPlan, uniform
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.model.families import shape_of


@pytest.fixture
def plan(tiny_llama):
    shape = shape_of(tiny_llama.config, tiny_llama.dtype)
    return uniform(shape, HeadPlan(full=True), target="int8 everywhere")


@pytest.fixture
def params():
    import torch

    centers = tuple(torch.full((2, 16), 0.5 + layer) for layer in range(2))
    return KVParams(centers, tuple(torch.ones(2, 16) for _ in range(2)))


def test_a_plan_brings_the_constants_beside_it(tmp_path, plan, params):
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert plan_row(tmp_path / "plan.json") == Row("int8 everywhere", plan, None)
    params.save(tmp_path / "kv_params.safetensors")
    for place in (tmp_path / "plan.json", tmp_path):
        found = plan_row(place)
        assert found.plan == plan
        assert found.params.k_center[1][0, 0] == 1.5


def test_a_missing_plan_is_one_line(tmp_path):
    with pytest.raises(PlanError, match="nowhere.json: cannot read the plan"):
        plan_row(tmp_path / "nowhere.json")


def test_rows_come_in_order_behind_the_reference(
    tiny_llama, tiny_tokenizer, text_file, plan, params
):
    suite = make_suite(tiny_tokenizer, tasks=[], context_tokens=100, windows=1, text=text_file)
    done = []
    rows = [Row("a", plan, None), Row("b", plan, params)]
    reports = list(compare(tiny_llama, tiny_tokenizer, suite, rows, done.append))
    assert [report.name for report in reports] == ["reference", "a", "b"]
    assert done == [1, 2, 3]
    assert reports[0].text.kl_nats == 0.0
    assert reports[1].text.kl_nats != reports[2].text.kl_nats  # the centre reaches the codes


def test_the_command_prints_json(tiny_model_dir, text_file, tmp_path, plan, capsys):
    (tmp_path / "plan.json").write_text(plan.to_json())
    options = ["--tasks", "", "--context", "128", "--windows", "1", "--text", str(text_file)]
    with pytest.raises(SystemExit, match="0"):
        main(["eval", str(tiny_model_dir), "--plan", str(tmp_path), "--json", *options])
    reference, ours = json.loads(capsys.readouterr().out)
    assert reference["target"] is None and ours["target"] == "int8 everywhere"
    assert ours["kv_bytes"] == ours["kv_bytes_accounted"] < reference["kv_bytes"]


def test_the_command_refuses_a_context_beyond_the_model(tiny_model_dir, text_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(tiny_model_dir), "--tasks", "", "--text", str(text_file)])
    error = capsys.readouterr().err.splitlines()[-1]  # transformers may show a bar before it
    assert error.startswith("error: ")
    assert "the model has positions for 256" in error
