"""Each named check has a bundle that it alone keeps out: without the check that bundle is let in.

What is let in is opened and loaded but not run, for some of it reads outside of its arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save

from kvcompress.bundle import manifest
from kvcompress.bundle.checks import CHECKS
from kvcompress.bundle.read import load_weights, open_bundle
from kvcompress.checkpoint import load as loading
from kvcompress.checkpoint import tensors
from kvcompress.errors import KVCompressError
from kvcompress.quant import keystats
from tests.fuzz.bundles import WEIGHTS, Bench

Change = Callable[[Any], Any]


def edit(name: str, *path: str | int, to: Any) -> Callable[[Bench], None]:
    """A damage: another value at `path` of a JSON file; the manifest fits."""

    def damage(bench: Bench) -> None:
        tree = json.loads(bench.whole[name])
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
        bench.put(name, json.dumps(tree).encode())
        if name != manifest.MANIFEST:
            bench.seal({*bench.changed})

    return damage


def retensor(
    name: str, change: Callable[[dict[str, torch.Tensor]], None]
) -> Callable[[Bench], None]:
    """A damage: other tensors in a file; index and manifest fit."""

    def damage(bench: Bench) -> None:
        found = load(bench.whole[name])
        change(found)
        bench.put(name, save({k: v.contiguous() for k, v in found.items()}, {"format": "pt"}))
        if name == WEIGHTS:
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(found, WEIGHTS)}
            bench.put(manifest.INDEX, json.dumps(index).encode())
        bench.seal({*bench.changed})

    return damage


def params(kind: str, change: Change) -> Callable[[Bench], None]:
    def changed(found: dict[str, torch.Tensor]) -> None:
        for name in list(found):
            if name.endswith(kind):
                found[name] = change(found[name])

    return retensor(manifest.PARAMS, changed)


def weight(name: str, change: Change) -> Callable[[Bench], None]:
    return retensor(WEIGHTS, lambda found: found.update({name: change(found[name])}))


def foreign_tokenizer(bench: Bench) -> None:
    """Everything agrees with everything but the tokenizer."""
    for name, key in ((manifest.PLAN, "tokenizer_hash"), (manifest.PROFILE, "tokenizer_hash")):
        bench.put(name, json.dumps({**json.loads(bench.whole[name]), key: "1" * 64}).encode())
    bench.seal({*bench.changed})
    listed = json.loads((bench.folder / manifest.MANIFEST).read_bytes())
    bench.put(manifest.MANIFEST, json.dumps({**listed, "tokenizer_hash": "1" * 64}).encode())


def other_recipe(bench: Bench) -> None:
    recipe = {**yaml.safe_load(bench.whole[manifest.RECIPE]), "weights": "int8"}
    bench.put(manifest.RECIPE, yaml.safe_dump(recipe).encode())
    bench.seal({*bench.changed})


BY_TRANSFORMERS = {"mismatched_keys", "error_msgs"}
LM_HEAD, NORM = "lm_head.weight", "model.norm.weight"
# names a format and leaves every layer out, so that nothing else meets it
INT8 = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "llm_int8_skip_modules": ["model", "lm_head"],
}

# (registry, check, weights of the bundle, what happens to it, what the check says)
Row = tuple[dict[str, Any], str, str, Callable[[Bench], None], str]
ROWS: list[Row] = [
    (CHECKS, "pointer", "bf16", edit("config.json", "kvcompress", to={}), "its kvcompress entry"),
    (CHECKS, "weight format", "bf16",
     edit("config.json", "quantization_config", to=INT8), "its quantization_config is not that of"),
    (CHECKS, "tensors of the index", "bf16",
     edit(manifest.INDEX, "weight_map", to=lambda m: {**m, "ghost": WEIGHTS}),
     "does not list the tensors"),
    (CHECKS, "dtypes of tensors", "bf16", weight(LM_HEAD, torch.Tensor.double),
     "is F64, which bf16"),
    (CHECKS, "size of the weights", "bf16",
     edit(manifest.MANIFEST, "weights", "size_bytes", to=lambda n: n + 1), "says that the weights"),
    (CHECKS, "configuration", "bf16",
     edit(manifest.MANIFEST, "base_model", "config_hash", to="0" * 64), "describes another model"),
    (CHECKS, "model of the plan", "bf16",
     edit(manifest.PLAN, "model", "config_hash", to="0" * 64), "was made for another model than"),
    (CHECKS, "model of the profile", "bf16",
     edit(manifest.PROFILE, "shape", "head_dim", to=32), "another head_dim than the plan's"),
    (CHECKS, "constants of the profile", "bf16",
     edit(manifest.PROFILE, "params_sha256", to="3" * 64), "not the key constants of the profile"),
    (CHECKS, "trained parameters", "bf16",
     params("surrogate", lambda v: v[:, :-1]), "was trained for hidden states of another size"),
    (CHECKS, "tokenizer", "bf16", foreign_tokenizer, "its tokenizer is not the one"),
    (CHECKS, "tokenizer of the plan", "bf16",
     edit(manifest.PLAN, "tokenizer_hash", to="2" * 64), "was made with another tokenizer, so"),
    (CHECKS, "tokenizer of the profile", "bf16",
     edit(manifest.PROFILE, "tokenizer_hash", to="2" * 64), "was made with another tokenizer; "),
    (CHECKS, "repeated tokens", "bf16",
     edit(manifest.PLAN, "repeat_ids", to=[5, 9999]), "repeat_ids names token 9999"),
    (CHECKS, "weights of the recipe", "bf16", other_recipe, "asks for int8 weights"),
    (keystats.HEADER_CHECKS, "dtype", "bf16", params("k_center", torch.Tensor.half), "is F16, not"),
    (keystats.HEADER_CHECKS, "size", "bf16", params("k_scale", lambda v: v[:, :4]), "has shape"),
    (keystats.HEADER_CHECKS, "size of a scorer", "bf16",
     params("surrogate", lambda v: v[:1]), "not 2 heads of one vector"),
    (keystats.VALUE_CHECKS, "range of scales", "bf16",
     params("k_scale", lambda v: v * 0), "has scales from 0 to 0"),
    (keystats.VALUE_CHECKS, "range of values", "bf16",
     params("surrogate", lambda v: v * float("nan")), "holds NaN, or values beyond"),
    (tensors.REPORT_CHECKS, "missing_keys", "bf16",
     retensor(WEIGHTS, lambda found: found.pop(LM_HEAD)), "is not among its weights"),
    (tensors.REPORT_CHECKS, "unexpected_keys", "bf16",
     retensor(WEIGHTS, lambda found: found.update(extra=torch.zeros(3).bfloat16())),
     "is not a tensor of the model"),
]  # fmt: skip

# functions that stand alone: (module, function, weights of the bundle, damage, what it says)
ALONE: list[tuple[Any, str, str, Callable[[Bench], None], str]] = [
    (tensors, "check_values", "bf16",
     weight(NORM, lambda v: v * float("inf")), "holds NaN or infinite"),
    (tensors, "check_size", "bf16",
     edit("config.json", "intermediate_size", to=2**14), "config.json describes"),
    (loading, "check_packed", "int8",
     retensor(WEIGHTS, lambda found: found.update(
         {k: v * -1 for k, v in found.items() if k.endswith("SCB")})), "scales that are negative"),
]  # fmt: skip


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def get(weights: str) -> Bench:
        if weights not in made:
            made[weights] = Bench(tmp_path_factory.mktemp("bench"), weights)
        return made[weights]

    return get


def ending(bench: Bench) -> str:
    """`let in`, or the line that says why not."""
    try:
        load_weights(open_bundle(bench.folder))
    except KVCompressError as error:
        return str(error)
    return "let in"


def both(
    bench: Bench, damage: Callable[[Bench], None], take_away: Callable[[], None]
) -> tuple[str, str]:
    """How the damaged bundle ends with the check and without."""
    try:
        damage(bench)
        checked = ending(bench)
        take_away()
        return checked, ending(bench)
    finally:
        bench.restore()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_an_undamaged_bundle_is_let_in(benches: Callable[[str], Bench], weights: str) -> None:
    assert ending(benches(weights)) == "let in"


@pytest.mark.parametrize(
    ("registry", "check", "weights", "damage", "problem"), ROWS, ids=[row[1] for row in ROWS]
)
def test_without_the_check_it_is_let_in(
    registry: dict[str, Any],
    check: str,
    weights: str,
    damage: Callable[[Bench], None],
    problem: str,
    benches: Callable[[str], Bench],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked, unchecked = both(
        benches(weights), damage, lambda: monkeypatch.delitem(registry, check)
    )
    assert problem in checked
    assert unchecked == "let in"


@pytest.mark.parametrize(
    ("module", "function", "weights", "damage", "problem"), ALONE, ids=[row[1] for row in ALONE]
)
def test_without_the_function_it_is_let_in(
    module: Any,
    function: str,
    weights: str,
    damage: Callable[[Bench], None],
    problem: str,
    benches: Callable[[str], Bench],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked, unchecked = both(
        benches(weights),
        damage,
        lambda: monkeypatch.setattr(module, function, lambda *_: None),
    )
    assert problem in checked
    assert problem not in unchecked


def test_every_named_check_has_its_bundle() -> None:
    """A check without a row is one that nothing needs, or that nobody tested."""
    registries = (CHECKS, keystats.HEADER_CHECKS, keystats.VALUE_CHECKS, tensors.REPORT_CHECKS)
    for registry in registries:
        tried = {check for owner, check, *_ in ROWS if owner is registry}
        assert tried == set(registry) - BY_TRANSFORMERS


def test_a_tokenizer_without_tokens_is_refused(benches: Callable[[str], Bench]) -> None:
    def empty(bench: Bench) -> None:
        tree = json.loads(bench.whole["tokenizer.json"])
        bench.put(
            "tokenizer.json", json.dumps({**tree, "model": {**tree["model"], "vocab": {}}}).encode()
        )
        bench.seal({*bench.changed})

    checked, _ = both(benches("bf16"), empty, lambda: None)
    assert "its tokenizer makes no token of a text" in checked


@pytest.mark.parametrize("method", [{}, [], 1, None, "x", True])
def test_a_quantization_by_anything_is_refused(
    method: Any, benches: Callable[[str], Bench]
) -> None:
    damage = edit("config.json", "quantization_config", to={"quant_method": method})
    checked, _ = both(benches("bf16"), damage, lambda: None)
    assert "its weights are quantized by" in checked


def test_transformers_itself_raises_on_another_shape(
    benches: Callable[[str], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `BY_TRANSFORMERS` have no row; a release that no longer raises is caught by them."""
    narrow = weight(LM_HEAD, lambda value: value[:, :-1])
    checked, unchecked = both(
        benches("bf16"), narrow, lambda: monkeypatch.setattr(tensors, "check_report", lambda *_: 0)
    )
    assert checked == unchecked != "let in"
