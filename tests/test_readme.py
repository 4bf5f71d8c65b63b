"""The README does what it prints: its blocks run in order, as from a fresh clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from kvcompress.errors import RecipeError
from kvcompress.plan import Budget, FastGenChoice, HeadPlan, PooledBudget, Recall, Threshold
from kvcompress.recipe import (
    BytesPolicy,
    Calibration,
    DuoPolicy,
    FastGenPolicy,
    Keep,
    LayersPolicy,
    Recipe,
    StaticCurvePolicy,
    UniformPolicy,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks in these languages, in their order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone after `make setup`, without what others left in this one."""
    for name in ("kvcompress", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.mark.slow
def test_the_walk_through_runs_as_printed(clone: Path, demo_model_dir: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    output, told = "", ""
    for language, code in blocks(README, "bash", "python"):
        if not (clone / ".venv" / "bin" / "activate").is_file():
            code = code.replace("source .venv/bin/activate\n", "")
        command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        done = subprocess.run(
            [*command[language], code], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
        told += done.stderr
    held = re.search(r"^(\d+) bytes of KV cache$", output, re.MULTILINE)
    assert held is not None and 900_000 < int(held[1]) < 1_000_000
    # both examples answer as the page says, `generate` with the words that it prints
    assert len(re.findall(r"^ copper lemon\.$", output, re.MULTILINE)) == 2
    printed = re.search(r"^\d+ tokens of prompt .*$", README, re.MULTILINE)
    assert printed is not None
    form = re.sub(r"[\d.]+", "N", printed[0])
    assert form in [re.sub(r"[\d.]+", "N", line) for line in told.splitlines()]


def test_the_commands_of_the_first_screen_are_make_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    first_screen = "\n".join(README.splitlines()[:60])
    named = re.findall(r"^make ([a-z-]+)", first_screen, re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


def test_every_command_that_is_printed_exists() -> None:
    from kvcompress.cli.app import COMMANDS, HIDDEN

    named = set(re.findall(r"^(?:\$ )?kvcompress ([a-z]+)", README, re.MULTILINE))
    assert named == set(COMMANDS) - {"demo", *HIDDEN}


def test_the_sample_of_bad_input_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(
        "name: mine\nkeep: {sinks: 4}\npolicy: {kind: fastgen, recovery: 1.5}\nname: yours\n"
    )
    with pytest.raises(RecipeError, match="bad.yaml") as caught:
        Recipe.load("bad.yaml")
    assert f"\nerror: {caught.value}\n" in README


def test_every_recipe_is_in_the_table() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"(recipes/{path.name})" in README


@pytest.mark.parametrize("code", [code for _, code in blocks(REFERENCE, "yaml")])
def test_every_block_of_the_recipe_reference_is_a_recipe(code: str) -> None:
    assert Recipe.from_yaml(code).to_yaml()


def test_the_recipe_reference_names_every_key() -> None:
    models: list[type[BaseModel]] = [
        Recipe,
        Calibration,
        Keep,
        PooledBudget,
        Threshold,
        FastGenChoice,
        Recall,
        HeadPlan,
        Budget,
        UniformPolicy,
        FastGenPolicy,
        LayersPolicy,
        StaticCurvePolicy,
        DuoPolicy,
        BytesPolicy,
    ]
    for model in models:
        for key in model.model_fields:
            assert re.search(rf"\b{key}:", REFERENCE), f"{model.__name__}.{key} is not described"


def test_the_recipe_reference_shows_the_defaults() -> None:
    shown = yaml.safe_load(blocks(REFERENCE, "yaml")[0][1])
    default = Recipe().model_dump(mode="json")
    for part in ("calibration", "keep"):
        assert shown[part] == default[part]
