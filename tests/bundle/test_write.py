"""Export: what a bundle holds, that it loads, and that a failed export changes nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcompress import atomic
from kvcompress.bundle import manifest, verify, write
from kvcompress.bundle.read import load_weights, open_bundle
from kvcompress.bundle.write import export
from kvcompress.cli.app import main
from kvcompress.errors import BundleError, UnsupportedModelError
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile
from tests.bundle.helpers import MIXED, Exported, Mixed, contents

SCHEMES = ("bf16", "int8", "nf4")
ATTENTION = 128 * 128 + 2 * 64 * 128 + 128 * 128
MLP = 3 * 128 * 176
OUTSIDE_LAYERS = 2 * 259 * 128 + 128  # embedding, output head, last norm
LAYER_NORMS = 2 * 128
NF4_TABLE_BYTES = 4 * (256 + 16) + 100
HEADER_BYTES = 8192  # names and offsets in front of the tensors

PLAIN = """
import sys
sys.modules["kvcompress"] = None  # any import of it now raises
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for bundle, expected in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(bundle).eval()
    logits = load_file(expected)
    with torch.inference_mode():
        found = model(input_ids=logits["ids"]).logits.float()
    assert (found - logits["logits"]).norm() <= 0.02 * logits["logits"].norm(), bundle
    assert AutoTokenizer.from_pretrained(bundle)("hi")["input_ids"][0] == 0
    print(bundle)
"""

FRESH = """
import sys
from kvcompress.bundle.verify import main
for bundle, expected in zip(sys.argv[1::2], sys.argv[2::2]):
    assert main([bundle, "--expected", expected]) == 0
"""

# forks, so that the exports share the seconds that the imports take
KILLED = """
import os, sys, time
from kvcompress.bundle.write import export
def note(text):
    if "fresh process" in text:
        print(os.getpid(), flush=True)
        time.sleep(120)
for out in sys.argv[3:]:
    if not os.fork():
        export(*sys.argv[1:3], out, overwrite=True, note=note)
    os.wait()
"""


def left_beside(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path != out]


@pytest.mark.parametrize("weights", SCHEMES)
def test_bundle_passes_its_own_checks(exported: Exported, weights: str) -> None:
    path, report = exported(weights)
    opened = open_bundle(path)
    assert opened.manifest.weights.format == opened.recipe.weights == weights
    assert report.reload_error <= 1e-2
    assert report.lossless_error <= 2e-2
    assert left_beside(path) == []


def test_weights_are_smaller_by_what_the_format_says(exported: Exported) -> None:
    parameters = 2 * (ATTENTION + MLP + LAYER_NORMS) + OUTSIDE_LAYERS
    bf16, int8, nf4 = (exported(weights)[1] for weights in SCHEMES)
    assert bf16.base_weights_bytes == nf4.base_weights_bytes == 2 * parameters
    assert bf16.weights_bytes == pytest.approx(2 * parameters, rel=0.01)
    # a byte less for each weight in the layers, a float32 scale more for each of their rows
    int8_bytes = 2 * parameters - 2 * (ATTENTION + MLP) + 2 * 4 * (3 * 128 + 2 * 64 + 2 * 176)
    assert int8.weights_bytes == pytest.approx(int8_bytes, abs=HEADER_BYTES)
    # half a byte and 1/64 byte of scales for each weight of the attention, a table for each matrix
    nf4_bytes = 2 * parameters - 2 * ATTENTION * (1.5 - 1 / 64) + 2 * 4 * NF4_TABLE_BYTES
    assert nf4.weights_bytes == pytest.approx(nf4_bytes, abs=HEADER_BYTES)
    assert int8.kept == ()
    names = ("gate_proj", "up_proj", "down_proj")
    assert set(nf4.kept) == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in names}


def in_fresh_process(script: str, *arguments: object) -> str:
    """What a script printed that came to its end."""
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_transformers_loads_every_format(exported: Exported, tmp_path: Path) -> None:
    arguments = []
    for weights in SCHEMES:
        path = exported(weights)[0]
        ids = torch.arange(3, 40)[None]
        with torch.inference_mode():
            logits = load_weights(open_bundle(path))(input_ids=ids).logits.float()
        expected = tmp_path / f"{weights}.safetensors"
        save_file({"ids": ids, "logits": logits}, expected)
        arguments += [str(path), str(expected)]
    assert in_fresh_process(PLAIN, *arguments).split() == arguments[::2]


def test_a_fresh_process_finds_every_format_sound(
    exported: Exported, mixed: Mixed, tmp_path: Path
) -> None:
    arguments = []
    for path in [*(exported(weights)[0] for weights in SCHEMES), mixed(MIXED)[0]]:
        expected = tmp_path / f"{len(arguments)}.safetensors"
        logits = verify.check_logits(load_weights(open_bundle(path)))
        save_file({"logits": logits}, expected)
        arguments += [path, expected]
    reports = [json.loads(line) for line in in_fresh_process(FRESH, *arguments).splitlines()]
    assert [report["path"] for report in reports] == [str(path) for path in arguments[::2]]
    assert all(report["reload_error"] <= 1e-2 for report in reports)


def test_layout(exported: Exported, plan: Plan) -> None:
    path = exported("bf16")[0]
    assert set(contents(path)) == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "kvcompress/manifest.json",
        "kvcompress/plan.json",
        "kvcompress/kv_params.safetensors",
        "kvcompress/profile.json",
        "kvcompress/recipe.yaml",
    }
    assert Plan.load(path) == plan
    config = json.loads((path / "config.json").read_text())
    assert config["kvcompress"] == {"schema": 1, "manifest": "kvcompress/manifest.json"}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        assert set(index["weight_map"]) == set(tensors.keys())
    modes = {file.stat().st_mode for file in path.rglob("*") if file.is_file()}
    assert len(modes) == 1


def test_nothing_tells_where_the_model_lay(exported: Exported, model_dir: Path) -> None:
    for name, data in contents(exported("nf4")[0]).items():
        assert str(model_dir.parent).encode() not in data, name


def test_card_has_the_bytes_of_the_bundle(exported: Exported) -> None:
    path, report = exported("int8")
    card = (path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "tiny-llama"
    assert head["base_model_relation"] == "quantized"
    assert head["license"] == "apache-2.0"
    ratio = report.weights_bytes / report.base_weights_bytes
    assert re.search(rf"\| weights \| int8 \| .* \| {ratio:.3f} \|", card)
    assert "| KV cache at 512 tokens | int8, k8v4 | 256.00 KiB |" in card


def test_measured_figures_reach_card_and_manifest(
    tmp_path: Path, model_dir: Path, profile_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_fresh_process(monkeypatch)
    export(model_dir, profile_dir, tmp_path / "b", measured={"recall": 0.975})
    opened = open_bundle(tmp_path / "b")
    assert opened.manifest.measured == {"recall": 0.975}
    assert "| recall | 0.975 |" in (tmp_path / "b" / "README.md").read_text()


def test_profile_knows_where_its_model_is(
    tmp_path: Path, profile_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_fresh_process(monkeypatch)
    export(None, profile_dir, tmp_path / "b")
    assert Profile.load(tmp_path / "b" / "kvcompress").model == "tiny-llama"


def test_calibration_text_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    quantization = {"bits": 4, "dataset": ["a private letter"], "tokenizer": "/home/me/model"}
    path.write_text(json.dumps({"_name_or_path": "/home/me", "quantization_config": quantization}))
    write._patch_config(path)
    assert json.loads(path.read_text()) == {
        "quantization_config": {"bits": 4},
        "kvcompress": {"schema": 1, "manifest": "kvcompress/manifest.json"},
    }


def skip_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify.VerifyReport("", "0" * 64, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(write, "_check_in_fresh_process", lambda *_: report)


# ------------------------------------------------------------------------------- failing exports
def fail_export(
    capsys: pytest.CaptureFixture[str], model: Path, profile: Path, out: Path, *options: str
) -> str:
    """The one line of a `kvcompress export` that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["export", str(profile), "-o", str(out), "--model", str(model), *options])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(err) == 1
    return err[0]


def full_disk(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize(
    "where",
    [
        "transformers.PreTrainedModel.save_pretrained",
        "kvcompress.bundle.write._write_rest",
        "kvcompress.bundle.files.same_permissions",
        "shutil.copyfile",
    ],
)
def test_full_disk(
    where: str,
    bundle: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(bundle)
    monkeypatch.setattr(where, full_disk)
    line = fail_export(capsys, model_dir, profile_dir, bundle, "--overwrite")
    assert f"{bundle}: No space left on device; free some space" in line
    assert contents(bundle) == before
    assert left_beside(bundle) == []


def test_full_disk_as_the_system_reports_it(
    tmp_path: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file size limit makes the real write of the weights fail half-way. Python ignores the
    signal that comes with it."""
    out = tmp_path / "out" / "bundle"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        line = fail_export(capsys, model_dir, profile_dir, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"error: {out}: the weights do not fit on the disk")
    assert list(out.parent.iterdir()) == []


def test_too_little_space_is_seen_before_the_work(
    tmp_path: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = fail_export(capsys, model_dir, profile_dir, tmp_path / "b")
    assert "1.00 KiB are free and the weights alone take about" in line
    assert list(tmp_path.iterdir()) == []


def test_keeps_an_existing_bundle_without_overwrite(
    bundle: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    line = fail_export(capsys, model_dir, profile_dir, bundle)
    assert "a bundle is there already; add --overwrite" in line
    assert contents(bundle) == before


def test_never_replaces_what_is_no_bundle(
    tmp_path: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    for out in (tmp_path / "letters", tmp_path / "letters" / "one.txt"):
        line = fail_export(capsys, model_dir, profile_dir, out, "--overwrite")
        assert "exists and is not a bundle" in line
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"


def test_failed_check_keeps_the_old_bundle(
    bundle: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saved weights that are not those of the model: the fresh process has to notice."""
    before = contents(bundle)
    truth = verify.check_logits
    monkeypatch.setattr(write, "check_logits", lambda model: truth(model) * 1.2)
    line = fail_export(capsys, model_dir, profile_dir, bundle, "--overwrite")
    assert "the written bundle failed its check, nothing was changed" in line
    assert "logits of the reloaded model differ by 0.167 of their size" in line
    assert contents(bundle) == before
    assert left_beside(bundle) == []


def test_overwrite_replaces_the_bundle(
    bundle: Path, model_dir: Path, profile_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_fresh_process(monkeypatch)
    export(model_dir, profile_dir, bundle, weights="int8", overwrite=True)
    assert open_bundle(bundle).manifest.weights.format == "int8"
    assert left_beside(bundle) == []


def test_killed_export_leaves_no_half_bundle(
    tmp_path: Path, exported: Exported, model_dir: Path, profile_dir: Path
) -> None:
    new, existing = tmp_path / "new" / "bundle", tmp_path / "existing" / "bundle"
    shutil.copytree(exported("bf16")[0], existing)
    before = contents(existing)
    command = [sys.executable, "-c", KILLED, *map(str, (model_dir, profile_dir, new, existing))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert process.returncode == 0
    assert not new.exists() and contents(existing) == before
    for out in (new, existing):
        (left,) = left_beside(out)
        assert left.startswith(".bundle.kvcompress-")
        (out.parent / left / "half").touch()
        with atomic.directory(out) as staged:
            assert list(staged.iterdir()) == []  # a new one of the same name
            shutil.copytree(exported("bf16")[0], staged, dirs_exist_ok=True)
        assert left_beside(out) == []


# ------------------------------------------------------------------------------------- bad input
def test_profile_of_another_model(
    tmp_path: Path, tiny_model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail_export(capsys, tiny_model_dir, profile_dir, tmp_path / "b")
    assert "its plan was made for another model than" in line


def test_profile_of_other_weights(
    tmp_path: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(model_dir, tmp_path / "model"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    line = fail_export(capsys, other, profile_dir, tmp_path / "b")
    assert "it profiled other weights than those of" in line


def test_profile_with_another_tokenizer(
    tmp_path: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(model_dir, tmp_path / "model"))
    data = json.loads((other / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    line = fail_export(capsys, other, profile_dir, tmp_path / "b")
    assert "its plan was made with another tokenizer" in line


def test_profile_without_a_plan(
    tmp_path: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = Path(shutil.copytree(profile_dir, tmp_path / "profile"))
    (profile / "plan.json").unlink()
    line = fail_export(capsys, model_dir, profile, tmp_path / "b")
    assert "has no plan.json; run kvcompress plan, or give --plan" in line


def test_missing_model(
    tmp_path: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail_export(capsys, tmp_path / "nowhere", profile_dir, tmp_path / "b")
    assert f"{tmp_path / 'nowhere'}: no such directory" in line
    (tmp_path / "empty").mkdir()
    line = fail_export(capsys, tmp_path / "empty", profile_dir, tmp_path / "b")
    assert "no config.json in it" in line


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), ": cannot load the weights (model.safetensors is not there)"),
        (lambda path: os.truncate(path, 1000), "/model.safetensors: not a whole safetensors file"),
        (lambda path: drop_tensor(path), ": lm_head.weight is not among its weights"),
    ],
)
def test_model_without_all_of_its_weights(
    damage: Callable[[Path], None],
    problem: str,
    tmp_path: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(model_dir, tmp_path / "model"))
    damage(other / "model.safetensors")
    line = fail_export(capsys, other, profile_dir, tmp_path / "b")
    assert f"{other}{problem}" in line
    assert left_beside(tmp_path / "b") == ["model"]


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def test_quantized_model(tmp_path: Path, exported: Exported, profile_dir: Path) -> None:
    with pytest.raises(BundleError, match="its weights are quantized already"):
        export(exported("int8")[0], profile_dir, tmp_path / "b")


def test_model_that_is_not_causal(tmp_path: Path, model_dir: Path, profile_dir: Path) -> None:
    from transformers import ViTConfig

    other = Path(shutil.copytree(model_dir, tmp_path / "model"))
    ViTConfig().save_pretrained(other)
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        export(other, profile_dir, tmp_path / "b")


def test_of_two_exports_to_one_place_one_is_told(
    tmp_path: Path, model_dir: Path, profile_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    with atomic.directory(out) as staged:
        (staged / "config.json").write_text("of the first one")
        line = fail_export(capsys, model_dir, profile_dir, out)
        assert f"{out}: the bundle cannot be written (another process is writing it" in line
    assert contents(out) == {"config.json": b"of the first one"}


def test_an_export_that_ended_in_between_is_not_replaced(
    bundle: Path,
    tmp_path: Path,
    model_dir: Path,
    profile_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other one ends after this one looked at the place and before it began to write."""
    out = tmp_path / "b"
    monkeypatch.setattr(write, "_check_space", lambda *_: shutil.copytree(bundle, out))
    line = fail_export(capsys, model_dir, profile_dir, out)
    assert "a bundle is there already; add --overwrite" in line
    assert contents(out) == contents(bundle)


def test_manifest_names_every_other_file(exported: Exported) -> None:
    path = exported("nf4")[0]
    listed = open_bundle(path).manifest
    assert set(listed.sizes_bytes) == set(contents(path)) - {manifest.MANIFEST}
    assert listed.needs == (
        "torch>=2.9",
        "transformers>=5.17",
        "bitsandbytes>=0.46.1",
        "accelerate>=1.1",
    )
    assert listed.base_model.id == "tiny-llama"
