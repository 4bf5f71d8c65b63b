"""A bundle that is not exactly what was exported is refused, with one line that says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcompress
from kvcompress.bundle import manifest, read
from kvcompress.bundle.read import _release, open_bundle
from kvcompress.bundle.verify import verify
from kvcompress.cli.app import main
from kvcompress.errors import BundleError, KVCompressError
from tests.bundle.helpers import Exported, edit_json, relist

WEIGHTS = "model.safetensors"


def truncate(bundle: Path) -> None:
    os.truncate(bundle / WEIGHTS, (bundle / WEIGHTS).stat().st_size - 1)


def tamper(bundle: Path) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(data)


def tamper_plan(bundle: Path) -> None:
    path = bundle / manifest.PLAN
    path.write_text(path.read_text().replace('"sink_tokens": 4', '"sink_tokens": 5'))


def drop(bundle: Path) -> None:
    (bundle / manifest.PARAMS).unlink()


def add_inside(bundle: Path) -> None:
    (bundle / "kvcompress" / "hook.py").write_text("print('hello')")


def add_weights(bundle: Path) -> None:
    save_file({"extra": torch.zeros(1)}, bundle / "model-2.safetensors")


def add_hidden(bundle: Path) -> None:
    (bundle / "kvcompress" / ".hidden").write_text("")


def link_out(bundle: Path) -> None:
    outside = bundle.parent / "outside.json"
    shutil.move(bundle / manifest.PROFILE, outside)
    (bundle / manifest.PROFILE).symlink_to(outside)


def link_folder(bundle: Path) -> None:
    shutil.move(bundle / "kvcompress", bundle.parent / "elsewhere")
    (bundle / "kvcompress").symlink_to(bundle.parent / "elsewhere")


def newer(bundle: Path) -> None:
    edit_json(bundle / manifest.MANIFEST, schema=2, unheard_of=True)


def unknown_key(bundle: Path) -> None:
    edit_json(bundle / manifest.MANIFEST, unheard_of=True)


def half_manifest(bundle: Path) -> None:
    path = bundle / manifest.MANIFEST
    path.write_bytes(path.read_bytes()[:100])


def listing(path: str) -> Callable[[Path], None]:
    """A damage: the manifest lists `path` too."""

    def damage(bundle: Path) -> None:
        data = json.loads((bundle / manifest.MANIFEST).read_text())
        entry = {"path": path, "size_bytes": 0, "sha256": "0" * 64}
        edit_json(bundle / manifest.MANIFEST, files=[*data["files"], entry])

    return damage


def index_out(bundle: Path) -> None:
    shutil.copy(bundle / WEIGHTS, bundle.parent / WEIGHTS)
    index = json.loads((bundle / manifest.INDEX).read_text())
    names = dict.fromkeys(index["weight_map"], f"../{WEIGHTS}")
    edit_json(bundle / manifest.INDEX, weight_map=names)
    relist(bundle)


def other_tokenizer(bundle: Path) -> None:
    """A tokenizer whose words have other ids, in a bundle that is otherwise consistent."""
    data = json.loads((bundle / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (bundle / "tokenizer.json").write_text(json.dumps(data))
    relist(bundle)


def other_tokenizer_hash(bundle: Path) -> None:
    edit_json(bundle / manifest.PLAN, tokenizer_hash="0" * 64)
    relist(bundle)


def other_config(bundle: Path) -> None:
    edit_json(bundle / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    relist(bundle)


def other_plan(bundle: Path) -> None:
    plan = json.loads((bundle / manifest.PLAN).read_text())
    edit_json(bundle / manifest.PLAN, model={**plan["model"], "config_hash": "0" * 64})
    relist(bundle)


def other_weights(bundle: Path) -> None:
    edit_json(bundle / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    relist(bundle)


def no_pointer(bundle: Path) -> None:
    edit_json(bundle / "config.json", kvcompress=None)
    relist(bundle)


def wrong_params(bundle: Path) -> None:
    ones = torch.ones(2, 16)
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("k_center", "k_scale")]
    save_file({name: ones.clone() for name in names}, bundle / manifest.PARAMS)
    relist(bundle)


def change_weights(bundle: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other tensors, in a bundle whose index and hashes are those of the new file."""
    tensors = load_file(bundle / WEIGHTS)
    change(tensors)
    save_file(tensors, bundle / WEIGHTS, {"format": "pt"})
    edit_json(bundle / manifest.INDEX, weight_map=dict.fromkeys(tensors, WEIGHTS))
    relist(bundle)


def other_constants(bundle: Path) -> None:
    """Key constants of another profile, sealed again."""
    edit_json(bundle / manifest.FOLDER / "profile.json", params_sha256="0" * 64)
    relist(bundle)


def other_index(bundle: Path) -> None:
    index = json.loads((bundle / manifest.INDEX).read_text())["weight_map"]
    edit_json(bundle / manifest.INDEX, weight_map={**index, "extra": WEIGHTS})
    relist(bundle)


def weights_of_integers(bundle: Path) -> None:
    change_weights(bundle, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}))


def other_heads(bundle: Path) -> None:
    """A plan with the right hash, for a model of half the head size."""
    plan = json.loads((bundle / manifest.PLAN).read_text())
    edit_json(bundle / manifest.PLAN, model={**plan["model"], "head_dim": 16})
    tensors = load_file(bundle / manifest.PARAMS)
    halves = {name: t[:, :16].contiguous() for name, t in tensors.items()}
    save_file(halves, bundle / manifest.PARAMS)
    relist(bundle)


def far_repeat_ids(bundle: Path) -> None:
    edit_json(bundle / manifest.PLAN, repeat_ids=[5, 10**6])
    relist(bundle)


def other_surrogate(bundle: Path) -> None:
    tensors = load_file(bundle / manifest.PARAMS)
    trained = {f"layers.{i}.scorer.surrogate": torch.ones(2, 5) for i in range(2)}
    save_file({**tensors, **trained}, bundle / manifest.PARAMS)
    relist(bundle)


def foreign_profile(bundle: Path) -> None:
    edit_json(bundle / manifest.PROFILE, calibration_texts=["a private letter"])
    relist(bundle)


def broken_params(bundle: Path) -> None:
    (bundle / manifest.PARAMS).write_bytes(b"\xff" * 64)
    relist(bundle)


def missing_package(bundle: Path) -> None:
    relist(bundle, needs=["kvcompress-no-such-package>=1.0"])


def old_package(bundle: Path) -> None:
    relist(bundle, needs=["torch>=999.0"])


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: r"model\.safetensors: truncated, it has \d+ bytes and the manifest says \d+; copy",
    tamper: r"model\.safetensors: changed after the export, its sha256 is",
    tamper_plan: r"plan\.json: changed after the export",
    other_constants: r"kv_params\.safetensors: not the key constants of the profile beside it",
    drop: r"kv_params\.safetensors: missing; copy or export",
    add_inside: r"hook\.py: not listed in kvcompress/manifest\.json; remove it",
    add_weights: r"model-2\.safetensors: not listed in",
    add_hidden: r"\.hidden: not listed in",
    link_out: r"profile\.json: a symbolic link; a bundle holds plain files only",
    link_folder: r"kvcompress: a symbolic link",
    newer: r"bundle schema 2 is newer than 1, .* upgrade kvcompress",
    unknown_key: r"manifest\.json: unheard_of: unknown key",
    half_manifest: r"manifest\.json: not JSON .* the file is damaged",
    index_out: r"index\.json: '\.\./model\.safetensors' is not the name of a safetensors file",
    other_tokenizer: r"its tokenizer is not the one in the manifest",
    other_tokenizer_hash: r"plan\.json: was made with another tokenizer",
    other_config: r"config\.json: describes another model than the manifest",
    other_plan: r"plan\.json: was made for another model than config\.json",
    other_weights: r"config\.json: its quantization_config is not that of bf16 weights",
    no_pointer: r"config\.json: its kvcompress entry is not",
    wrong_params: r"k_center has shape \(2, 16\), the model has \(2, 32\)",
    other_index: r"does not list the tensors that are in the files",
    weights_of_integers: r"lm_head.weight is I32, which bf16 weights do not have",
    other_heads: r"plan\.json: its model has another head_dim than config\.json",
    far_repeat_ids: r"repeat_ids names token 1000000, the model has \d+; profile and export",
    other_surrogate: r"surrogate was trained for hidden states of another size than 128",
    foreign_profile: r"profile\.json: calibration_texts: unknown key",
    broken_params: r"no key constants can be read",
    missing_package: r"needs kvcompress-no-such-package>=1\.0; pip install",
    old_package: r"needs torch>=999\.0, found ",
    listing("../outside.json"): r"must not leave the bundle directory \(got '\.\./outside\.json'\)",
    listing("a/../../b.json"): r"must not leave the bundle directory",
    listing("a//b.json"): r"must not leave the bundle directory",
    listing("/etc/hosts.json"): r"must be relative, with forward slashes",
    listing("a\nb.json"): r"must be printable",
    listing("c:\\b.json"): r"must be relative, with forward slashes",
    listing("pytorch_model.bin"): r"\.bin files have no place in a bundle",
    listing("modeling.py"): r"\.py files have no place in a bundle",
    listing("adapter_config.json"): r"no place in a bundle",
    listing("config.json"): r"lists config\.json twice",
    listing("Config.json"): r"lists config\.json twice",
    listing(manifest.MANIFEST): r"must not list kvcompress/manifest\.json itself",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_refuses(bundle: Path, damage: Callable[[Path], None]) -> None:
    damage(bundle)
    with pytest.raises(KVCompressError, match=DAMAGES[damage]):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "damage", [truncate, tamper, newer, index_out, link_out, other_tokenizer, listing("../x.json")]
)
@pytest.mark.parametrize("command", ["verify", "inspect", "generate"])
def test_every_command_refuses_in_one_line(
    bundle: Path, damage: Callable[[Path], None], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(bundle)
    prompt = ["-p", "hello"] if command == "generate" else []
    with pytest.raises(SystemExit) as stop:
        main([command, str(bundle), *prompt])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ") and str(bundle) in err


def nothing(*arguments: object) -> None:
    """In place of a check."""


# the checks that stand in no list, see test_checks.py for those that do
ALONE: dict[tuple[object, str], Callable[[Path], None]] = {
    (read, "_check_files"): tamper_plan,
    (read, "_check_needs"): old_package,
}


@pytest.mark.parametrize("check", ALONE, ids=lambda check: check[1])
def test_every_check_is_needed(
    check: tuple[object, str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ALONE[check](bundle)
    with pytest.raises(BundleError, match="bundle"):
        open_bundle(bundle)
    monkeypatch.setattr(*check, nothing)
    assert open_bundle(bundle).path == bundle


NAN, NONE = float("nan"), "model.layers.1.mlp.up_proj.weight"
WEIGHT_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(NONE), f"{NONE} is not among its weights"),
    "no layers": (
        lambda t: [t.pop(name) for name in list(t) if ".layers." in name],
        "is not among its weights",
    ),
    "one more": (lambda t: t.update(extra=torch.zeros(1)), "extra is not a tensor of the model"),
    "shape": (lambda t: t.update({NONE: torch.zeros(3, 3)}), "cannot load the weights"),
    "nan": (lambda t: t[NONE].fill_(NAN), f"{NONE} holds NaN or infinite values"),
    "huge": (lambda t: t[NONE].fill_(1e30), f"{NONE} holds .* no weight is beyond 65504"),
}


@pytest.mark.parametrize("name", WEIGHT_DAMAGES)
def test_load_and_verify_refuse_the_same_weights(name: str, bundle: Path) -> None:
    change, message = WEIGHT_DAMAGES[name]
    change_weights(bundle, change)
    with pytest.raises(BundleError, match=message) as loading:
        kvcompress.load(bundle)
    with pytest.raises(BundleError, match=message) as verifying:
        verify(bundle)
    assert str(loading.value) == str(verifying.value) and "\n" not in str(loading.value)


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_refuses_what_is_no_bundle(tmp_path: Path, name: str) -> None:
    with pytest.raises(KVCompressError, match=r"not a bundle, it has no kvcompress/manifest\.json"):
        open_bundle(tmp_path / name)


def test_opens_what_was_exported(bundle: Path, exported: Exported) -> None:
    opened = open_bundle(bundle)
    assert opened.digest == exported("bf16")[1].digest
    assert opened.plan.heads[0][0].v_dtype == "int4"
    assert opened.recipe.weights == "bf16"
    assert opened.params.k_center[0].shape == (2, 32)
    assert opened.weights_bytes == (bundle / WEIGHTS).stat().st_size


def test_hidden_files_at_the_top_belong_to_others(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (bundle / ".cache").mkdir()
    assert open_bundle(bundle).manifest.weights.format == "bf16"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.11.0+cu130", (2, 11)), ("5.23.0", (5, 23)), ("2.9", (2, 9)), ("1.0.dev3", (1,))],
)
def test_release_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert _release(text) == numbers
