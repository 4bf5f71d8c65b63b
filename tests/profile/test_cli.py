"""`kvcompress profile` and `kvcompress plan`, as a user runs them."""

import json

import pytest
from transformers import BertConfig, BertForMaskedLM, T5Config

from kvcompress.cli.app import main
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile

RECIPE = """
calibration: {prompts: 1, tokens: 192}
policy: {kind: fastgen, recovery: 0.9}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, llama, tiny_tokenizer):
    path = tmp_path_factory.mktemp("models") / "llama"
    llama.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def kvcompress(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def test_profile_then_plan(model_dir, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    out = tmp_path / "runs" / "p"
    command = ("profile", model_dir, "-r", tmp_path / "r.yaml", "-o", out, "--device", "cpu")
    assert kvcompress(*command, "--json") == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown["target"] == "FastGen recovery 0.9 by mass" and shown["context_tokens"] == 192
    assert f"profile and plan written to {out}" in captured.err.replace("\n", "")
    assert Plan.load(out).target == shown["target"]
    assert Profile.load(out).model == str(model_dir)

    plan = tmp_path / "plans" / "plan.json"
    target = ("--keep-ratio", "0.5", "--context", "256")
    assert kvcompress("plan", out, *target, "-o", plan) == 2
    assert "--also losses -o DIR" in capsys.readouterr().err and not plan.exists()
    more = ("profile", model_dir, "-o", out, "--also", "losses", "--also", "weights")
    assert kvcompress(*more, "--memory-limit", "1KiB") == 2
    assert "is too small: the model and a prompt of" in capsys.readouterr().err
    assert kvcompress(*more, "--memory-limit", "much") == 2
    assert "'much' is not a size" in capsys.readouterr().err
    assert kvcompress("profile", model_dir, "-o", out, "--also", "loss") == 2
    assert "recovery, losses, weights, heads" in capsys.readouterr().err
    assert kvcompress(*more) == 0
    assert Profile.load(out).parts == ("recovery", "losses", "weights")
    capsys.readouterr()
    assert kvcompress("plan", out, "--keep-ratio", "0.5", "--context", "256", "-o", plan) == 0
    assert "0.5 of the bf16 KV bytes at 256 tokens" in capsys.readouterr().out
    assert Plan.load(plan).target.startswith("0.5 of the bf16")
    assert kvcompress("plan", out, "--memory", "1B", "--context", "256", "-o", plan) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1B in all") and len(error.splitlines()) == 1
    assert Plan.load(plan).target.startswith("0.5 of the bf16")


def test_data_is_added_to_recall_prompts_or_stands_alone(model_dir, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("prompts: 1", "prompts: 2"))
    out = tmp_path / "p"
    command = ("profile", model_dir, "-r", tmp_path / "r.yaml", "-o", out, "-d")
    assert kvcompress(*command, tmp_path / "gone.txt") == 2
    assert "gone.txt: no such file" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "text.txt").write_text("Some words of my own. " * 20)
    text = str(tmp_path / "text.txt")
    assert kvcompress(*command[:-1], "-d", text, "--mix", f"{text}=1") == 2
    assert "give --data or --mix, not both" in capsys.readouterr().err
    assert kvcompress(*command, text) == 0
    assert Profile.load(out).provenance.data == f"0.5 recall + 0.5 {text}"
    assert Profile.load(out).recipe.calibration.mix == {"recall": 0.5, text: 0.5}
    capsys.readouterr()
    alone = (*command[:4], "-o", tmp_path / "alone", "--mix", f"{text}=1")
    assert kvcompress(*alone) == 0
    note = Profile.load(tmp_path / "alone").calibration_note
    assert note.startswith(
        "no calibration prompt is known to need what stands far above (2 of your"
    )
    assert f"note: {note}" in capsys.readouterr().err.replace("\n", " ")


def saved(path, config, model=None):
    path.mkdir()
    (model or config).save_pretrained(path)
    return path


def test_models_that_cannot_be_profiled(tmp_path, capsys):
    out = tmp_path / "p"

    def error_of(model):
        capsys.readouterr()
        assert kvcompress("profile", model, "-o", out) == 2
        text = capsys.readouterr().err.strip()
        assert text.startswith("error: ") and len(text.splitlines()) == 1
        assert not out.exists()
        return text

    assert "no such directory; give a model directory or a hub name" in error_of(tmp_path / "gone")
    assert "no such directory; give a model directory or a hub name" in error_of("gone")
    (tmp_path / "empty").mkdir()
    assert "no config.json in it" in error_of(tmp_path / "empty")
    t5 = saved(tmp_path / "t5", T5Config())
    assert "t5 is an encoder-decoder model" in error_of(t5)
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    bert = saved(tmp_path / "bert", small, BertForMaskedLM(small))
    assert "BertForMaskedLM is not a causal language model" in error_of(bert)
    assert "cannot load the" in error_of("nobody/nothing")


def test_a_plan_needs_a_profile(tmp_path, capsys):
    assert kvcompress("plan", tmp_path, "-o", tmp_path / "plan.json") == 2
    assert "no profile there" in capsys.readouterr().err
