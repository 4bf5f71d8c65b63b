"""tools/reference_kl.py against formulas written out, and against the package."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
PROMPT, FED, SCORED = [0, 20, 21, 22, 23], [30, 31, 32, 33], [1, 3]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference_kl", ROOT / "tools/reference_kl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(reference, capsys, model_dir, folder, logits):
    item = {"prompt": PROMPT, "fed": FED, "scored": SCORED}
    (folder / "items.json").write_text(json.dumps([item]))
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    reference.main(str(model_dir), str(folder))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_shares_no_code_with_the_package():
    text = (ROOT / "tools" / "reference_kl.py").read_text(encoding="utf-8")
    assert "import kvcompress" not in text and "from kvcompress" not in text


def test_the_full_cache_beside_itself(reference, capsys, tiny_llama, tiny_model_dir, tmp_path):
    with torch.inference_mode():
        due = tiny_llama(torch.tensor([PROMPT + FED])).logits[0, [5, 7]]
    found = run(reference, capsys, tiny_model_dir, tmp_path, due)
    assert found["items"] == 1 and found["tokens"] == 2
    assert found["kl_nats"] == pytest.approx(0.0, abs=1e-9) and found["flips"] == 0
    assert found["nats"] == pytest.approx(found["full_nats"])
    p = due.double().softmax(-1)
    assert found["nats"] == pytest.approx(-float(p[0, 31].log() + p[1, 33].log()) / 2)


def test_figures_of_logits_that_say_nothing(
    reference, capsys, tiny_model_dir, tiny_llama, tmp_path
):
    size = tiny_llama.config.vocab_size
    found = run(reference, capsys, tiny_model_dir, tmp_path, torch.zeros(2, size))
    with torch.inference_mode():
        due = tiny_llama(torch.tensor([PROMPT + FED])).logits[0, [5, 7]].double()
    p = due.softmax(-1)
    uniform = torch.tensor(float(size)).log().double()
    assert found["nats"] == pytest.approx(float(uniform))
    expected = float((p * (p.log() + uniform)).sum(-1).mean())
    assert found["kl_nats"] == pytest.approx(expected, rel=1e-4)  # float32 logits of two lengths
    assert found["right"] == 0.0 and found["flips"] == float((due.argmax(-1) != 0).double().mean())


def test_logits_of_too_few_places_are_refused(reference, capsys, tiny_model_dir, tmp_path):
    with pytest.raises(AssertionError, match="one row for each place"):
        run(reference, capsys, tiny_model_dir, tmp_path, torch.zeros(1, 8))


def test_the_package_agrees_with_it(
    benchmark, tiny_llama, tiny_tokenizer, tiny_model_dir, tmp_path
):
    from kvcompress.evaluate.drawing import Sizes
    from kvcompress.evaluate.workloads import make_workloads
    from kvcompress.evaluate.workloads_run import run_workload
    from kvcompress.plan import Budget, HeadPlan, uniform
    from kvcompress.runtime.model.families import shape_of

    check = benchmark("reference_check").check
    shape = shape_of(tiny_llama.config, torch.float32)
    plan = uniform(shape, HeadPlan(local=Budget(tokens=40)), recent_tokens=8)
    sizes = Sizes(120, 999, windows=2, continuation_tokens=6)
    for name in ("arithmetic", "prose"):
        (suite,) = make_workloads(tiny_tokenizer, sizes, names=(name,), samples=3)
        outcome = run_workload(tiny_llama, tiny_tokenizer, suite, plan)
        both = check(
            str(tiny_model_dir), tiny_llama, tiny_tokenizer, suite, plan, None, outcome, tmp_path
        )
        for figure, ours in both["package"].items():
            assert ours == pytest.approx(both["plain"][figure], abs=1e-4), figure
