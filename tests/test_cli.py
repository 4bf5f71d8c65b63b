"""The program: help, JSON, and one line with exit code 2 for everything that a user can mend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcompress.cli import app, common
from tests.bundle.helpers import checked_here

RECIPE = """\
name: small
calibration: {prompts: 2, tokens: 96}
policy:
  kind: uniform
  head: {full: true, k_dtype: int8, v_dtype: int8}
"""
SECRET = "the heron keeps its secrets"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the program inside this process; file descriptors are captured, not only sys.stderr."""

    def run_(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            app.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0, out, err)

    return run_


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def profile(tiny_model_dir: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished profile of the tiny model, made by the program itself."""
    folder = tmp_path_factory.mktemp("profile")
    out, data = folder / "p", folder / "calibration.txt"
    data.write_text(f"{SECRET}. " * 20, encoding="utf-8")
    arguments = ["-r", str(recipe), "-d", str(data), "-o", str(out), "--also", "recovery"]
    with pytest.raises(SystemExit) as stop:
        app.main(["profile", str(tiny_model_dir), *arguments])
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="module")
def bundle(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    with pytest.raises(SystemExit) as stop:
        app.main(["export", str(profile), "-o", str(out)])
    assert stop.value.code == 0
    return out


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for part in parts:
        assert part in result.err


# help


@pytest.mark.parametrize("name", app.COMMANDS)
def test_help_has_an_example_and_offers_json(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.code == 0
    assert f"Usage: kvcompress {name}" in result.out
    assert result.out.count(f"kvcompress {name}") >= 2, "help shows no example"
    assert "--json" in result.out


def test_help_lists_every_command(run: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = run(*arguments)
        assert result.code == 0
        listed = {line.split()[1] for line in result.out.splitlines() if line.startswith("│ ")}
        assert set(app.COMMANDS) - listed == set(app.HIDDEN)


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, "kvcompress 0.1.0\n")


def test_the_module_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress", "--nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: No such option: --nonsense: see kvcompress --help\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nonsense",), ("No such command 'nonsense'", "see kvcompress --help")),
        (("profile",), ("Missing argument", "see kvcompress profile --help")),
        (("profile", "m", "--nonsense"), ("--nonsense", "see kvcompress profile --help")),
        (("inspect", "x", "--context", "many"), ("'--context'", "see kvcompress inspect --help")),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments, parts) -> None:
    assert_one_line(run(*arguments), *parts)


# what commands print


def test_emit_prints_json_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"head": 0, "kv_bytes": 1536, "loss": float("nan"), "path": Path("a"), "ids": (1, 2)}]
    common.emit({"heads": rows, "ok": True}, json_=True)
    assert json.loads(capsys.readouterr().out) == {
        "heads": [{"head": 0, "kv_bytes": 1536, "loss": None, "path": "a", "ids": [1, 2]}],
        "ok": True,
    }


def test_emit_prints_tables_with_units(capsys: pytest.CaptureFixture[str]) -> None:
    common.emit({"name": "b", "total_bytes": 3 * 2**20, "heads": [{"kl": 0.012345}]}, json_=False)
    out, err = capsys.readouterr()
    assert "3.00 MiB" in out and "0.01235" in out and "heads" in out
    assert err == ""


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**30, "1.00 GiB"), (2**50, "1024.00 TiB")],
)
def test_human_bytes(count_bytes: int, text: str) -> None:
    assert common.human_bytes(count_bytes) == text


# recipes


def test_unknown_recipe_key(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("polcy: {}\nkeep: {sinks: 4}\n")
    result = run("profile", tiny_model_dir, "-r", path, "-o", tmp_path / "p")
    assert_one_line(result, str(path), "polcy: unknown key", "keep.sinks: unknown key")
    assert not (tmp_path / "p").exists()


def test_duplicate_recipe_key(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nname: b\n")
    result = run("profile", tiny_model_dir, "-r", path, "-o", tmp_path / "p")
    assert_one_line(result, str(path), "name: duplicate key on line 2")


def test_missing_recipe(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = run("profile", tiny_model_dir, "-r", tmp_path / "no.yaml", "-o", tmp_path / "p")
    assert_one_line(result, "no.yaml")


# models


@pytest.mark.parametrize("command", ["profile", "eval"])
def test_missing_model(run: Run, tmp_path: Path, command: str) -> None:
    arguments = ["-o", tmp_path / "p"] if command == "profile" else []
    assert_one_line(run(command, tmp_path / "missing", *arguments), str(tmp_path / "missing"))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_model_that_is_not_a_causal_decoder(run: Run, tiny_tokenizer, tmp_path, kind) -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    size = len(tiny_tokenizer)
    if kind == "bert":
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertModel(BertConfig(vocab_size=size, intermediate_size=32, **small))
    else:
        small = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=size, **small))
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    result = run("profile", tmp_path / "m", "-o", tmp_path / "p")
    assert_one_line(result)
    assert kind in result.err.lower()
    assert not (tmp_path / "p" / "profile.json").exists()


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert_one_line(run("profile", tmp_path / "m", "-o", tmp_path / "p"), str(tmp_path / "m"))


# calibration


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.txt", ""),
        ("short.txt", "Too short.\n"),
        ("empty.jsonl", ""),
        ("short.jsonl", '{"text": "Too short."}\n'),
        ("wrong.jsonl", '{"body": "No text here."}\n'),
        ("broken.jsonl", '{"text": "cut'),
        ("missing.txt", None),
    ],
)
def test_calibration_that_cannot_be_used(
    run: Run, tiny_model_dir: Path, recipe: Path, tmp_path: Path, name: str, text: str | None
) -> None:
    data = tmp_path / name
    if text is not None:
        data.write_text(text)
    result = run("profile", tiny_model_dir, "-r", recipe, "-d", data, "-o", tmp_path / "p")
    assert_one_line(result, name)
    assert not (tmp_path / "p" / "profile.json").exists()


# profiles and plans


def test_neither_profile_nor_bundle_holds_calibration_text(profile: Path, bundle: Path) -> None:
    names = {path.name for path in profile.iterdir()}
    assert {"profile.json", "plan.json", "kv_params.safetensors"} <= names
    for path in (*profile.rglob("*"), *bundle.rglob("*")):
        assert not path.is_file() or b"heron" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "target",
    [("--keep-ratio", "0.0001"), ("--memory", "1KiB", "--context", "128", "--batch", "1")],
)
def test_impossible_byte_target(run: Run, profile: Path, tmp_path: Path, target) -> None:
    assert_one_line(run("plan", profile, *target, "-o", tmp_path / "plan.json"))
    assert not (tmp_path / "plan.json").exists()


def test_a_size_that_is_not_a_size(run: Run, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run("plan", profile, "--memory", "8GB", "--context", 128, "--batch", 1, "-o", out)
    assert_one_line(result, "8GB")


def test_plan_solves_again_without_profiling(run: Run, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run("plan", profile, "--recovery", "0.9", "-o", out, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)
    from kvcompress.plan import Plan

    assert Plan.load(out).model == Plan.load(profile).model


@pytest.mark.parametrize("command", ["plan", "export", "inspect", "verify", "generate", "chat"])
def test_a_folder_that_is_not_there(run: Run, tmp_path: Path, command: str) -> None:
    extra = {
        "plan": ("--recovery", "0.9", "-o", tmp_path / "x"),
        "export": ("-o", tmp_path / "x"),
        "generate": ("-p", "Note:"),
    }
    result = run(command, tmp_path / "missing", *extra.get(command, ()))
    assert_one_line(result, str(tmp_path / "missing"))
    assert not (tmp_path / "x").exists()


# bundles


def test_a_bundle_of_the_program_verifies_and_generates(run: Run, bundle: Path) -> None:
    verified = run("verify", bundle, "--json")
    assert verified.code == 0, verified.err
    both = run("inspect", bundle, "--verify", "--json")
    assert both.code == 0, both.err
    assert json.loads(both.out) == {
        "plan": json.loads(run("inspect", bundle, "--json").out),
        "checks": json.loads(verified.out),
    }
    call = ("generate", bundle, "-p", "Note: amber river", "--max-new-tokens", 4, "--json")
    made = run(*call)
    assert made.code == 0, made.err
    held = json.loads(made.out)["kv_cache_bytes"]
    made = run(*call, "--protect", "0:12")
    assert made.code == 0, made.err
    assert json.loads(made.out)["kv_cache_bytes"] >= held
    made = run(*call, "--protect", "12")
    assert made.code == 2
    assert "write FIRST:STOP, like 0:128" in made.err


def test_probe_reports_or_refuses(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = run("probe", tiny_model_dir, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["refused"] is None
    assert {f["status"] for f in found["findings"]} == {"yes"}
    made_up = run("probe", tiny_model_dir, "--random-weights", "--layers", 1)
    assert made_up.code == 0, made_up.err
    assert "1 full layers, 2 KV heads of 16 channels" in " ".join(made_up.err.split())
    assert run("probe", tiny_model_dir, "--layers", 1).code == 2
    from transformers import FalconConfig

    FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                 architectures=["FalconForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    for command in ("doctor", "probe"):
        refused = run(command, tmp_path, "--random-weights")
        assert refused.code == 2
        assert "bypasses transformers' attention interface" in " ".join(refused.out.split())


def test_doctor_says_of_a_model_what_probe_said(run: Run, tiny_model_dir: Path) -> None:
    alone, model = run("doctor", "--json"), run("doctor", tiny_model_dir, "--json")
    assert alone.code == model.code == 0, model.err
    found = json.loads(model.out)
    assert found["installation"] == json.loads(alone.out)
    assert found["model"] == json.loads(run("probe", tiny_model_dir, "--json").out)


@pytest.mark.parametrize("what", ["profile", "bundle"])
def test_inspect_predicts_bytes_for_any_context(run: Run, what: str, request) -> None:
    folder = request.getfixturevalue(what)
    result = run("inspect", folder, "--context", 64, "--batch", 2, "--json")
    assert result.code == 0, result.err
    from kvcompress.accounting import kv_bytes
    from kvcompress.plan import Plan

    assert f": {kv_bytes(Plan.load(folder), 64, 2)}" in result.out


def test_an_existing_bundle_is_never_damaged(run: Run, profile: Path, bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert_one_line(run("export", profile, "-o", bundle), str(bundle))
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["verify", "generate", "inspect"])
def test_a_damaged_bundle(run: Run, bundle: Path, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    plan = copy / "kvcompress" / "plan.json"
    plan.write_text(plan.read_text().replace('"sink_tokens": 4', '"sink_tokens": 3'))
    extra = ("-p", "Note:") if command == "generate" else ()
    assert_one_line(run(command, copy, *extra), "plan.json")


# another recipe than the profile's


OTHER = "name: other\npolicy: {kind: uniform, head: {full: true, k_dtype: int4, v_dtype: int4}}\n"
LACKING = "name: lacking\nkeep: {scorer: raw}\npolicy: {kind: bytes, keep_ratio: 0.5, context: 9}\n"


def test_export_solves_the_recipe_that_is_given(run: Run, profile: Path, tmp_path: Path) -> None:
    from kvcompress.plan import Plan
    from kvcompress.recipe import Recipe

    recipe = tmp_path / "other.yaml"
    recipe.write_text(OTHER)
    with checked_here():
        assert run("export", profile, "-r", recipe, "-o", tmp_path / "b").code == 0
    assert run("plan", profile, "-r", recipe, "-o", tmp_path / "plan.json").code == 0
    shipped = Plan.load(tmp_path / "b")
    assert shipped == Plan.load(tmp_path / "plan.json") != Plan.load(profile)
    assert {head.storage for row in shipped.heads for head in row} == {"int4"}
    kept = Recipe.load(tmp_path / "b" / "kvcompress" / "recipe.yaml")
    assert kept.name == "other" and kept.calibration.tokens == 96
    assert kept.policy == Recipe.load(recipe).policy


@pytest.mark.parametrize("command", ["plan", "export"])
def test_a_recipe_that_was_not_measured_is_refused(
    run: Run, profile: Path, tmp_path: Path, command: str
) -> None:
    recipe, out = tmp_path / "lacking.yaml", tmp_path / "out"
    recipe.write_text(LACKING)
    result = run(command, profile, "-r", recipe, "-o", out)
    assert_one_line(result, "recipe lacking: ", "keep.scorer lift, asked for is raw")
    assert "-r RECIPE -o DIR" in result.err and not out.exists()


def test_a_plan_and_a_recipe_contradict(run: Run, profile: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(OTHER)
    both = ("--plan", profile / "plan.json", "-r", tmp_path / "other.yaml")
    result = run("export", profile, *both, "-o", tmp_path / "b")
    assert_one_line(result, "--plan ships a plan that is there, --recipe solves one: give one")
