"""What is imported is declared, and what is installed is what the lock names."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# module -> distribution, where the two have different names
DISTRIBUTION = {
    "PIL": "pillow",
    "hypothesis": "hypothesis",
    "lm_eval": "lm-eval",
    "optimum.quanto": "optimum-quanto",
    "pytest": "pytest",
    "yaml": "pyyaml",
}
OWN = {"kvcompress", "tests", "tools", "speed", "pages", "pip"}  # pip comes with every environment
# folders whose scripts run in environments of their own, with the lists that these install
BESIDE = {
    "benchmarks/peers": ROOT / "benchmarks/peers/requirements-kvpress.txt",
    "benchmarks/speed": ROOT / "benchmarks/speed/requirements-quant.txt",
    "benchmarks/vllm_cpu": ROOT / "benchmarks/vllm_cpu/requirements.txt",
}


def names(lines: list[str]) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in lines}


def extras(*chosen: str) -> set[str]:
    optional = PROJECT["optional-dependencies"]
    return names([line for extra in chosen or optional for line in optional[extra]])


def imports_of(path: Path) -> set[tuple[int, str]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {(node.lineno, f"{node.module}.{alias.name}") for alias in node.names}
    return found


def undeclared(path: Path, declared: set[str], local: set[str] = frozenset()) -> list[str]:
    wrong = []
    for line, name in sorted(imports_of(path)):
        first = name.partition(".")[0]
        if first in sys.stdlib_module_names or first in OWN or first in local:
            continue
        longest = next((m for m in DISTRIBUTION if name == m or name.startswith(f"{m}.")), first)
        distribution = DISTRIBUTION.get(longest, first).lower().replace("_", "-")
        if distribution not in declared:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def at_the_top(path: Path) -> set[int]:
    """Lines of the imports that run whenever the file is imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.lineno for node in body if isinstance(node, ast.Import | ast.ImportFrom)}


# files that only their extra's own command imports, and that import it whole
WITH_EXTRA = {
    "kvcompress/evaluate/harness_model.py",
    "kvcompress/kernels/triton_encode.py",
    "kvcompress/kernels/triton_tiles.py",
    "kvcompress/kernels/triton_view.py",
}


def test_what_the_package_imports_is_declared():
    """Required packages everywhere, those of an extra inside of a function."""
    required = names(PROJECT["dependencies"])
    declared = required | extras("eval", "gguf", "gpu", "plots", "quantized-cache")
    files = sorted((ROOT / "kvcompress").rglob("*.py"))
    assert len(files) > 200
    wrong = []
    for path in files:
        wrong += undeclared(path, declared)
        place = path.relative_to(ROOT).as_posix()
        if path.name != "triton.py" and place not in WITH_EXTRA:
            top = {f"{place}:{line}" for line in at_the_top(path)}
            wrong += [w for w in undeclared(path, required) if w.partition(" ")[0] in top]
    assert wrong == []


@pytest.mark.parametrize("folder", ["tests", "tools", "benchmarks"])
def test_what_the_scripts_and_tests_import_is_declared(folder):
    declared = names(PROJECT["dependencies"]) | extras()
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        beside = next((f for f in BESIDE if path.is_relative_to(ROOT / f)), None)
        more = set() if beside is None else {*_listed(BESIDE[beside]), *("kvpress", "vllm")}
        local = {p.stem for p in path.parent.glob("*.py")} | {
            p.stem for p in path.parent.parent.glob("*.py")
        }
        wrong += undeclared(path, declared | more, local)
    assert wrong == []


def _listed(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return names([line for line in lines if re.match(r"[a-zA-Z]", line)])


def test_an_undeclared_import_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_packaging.ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text("import os, torch\ndef f():\n    from requests.sessions import Session\n")
    assert undeclared(path, {"torch"}) == ["a.py:3 imports requests.sessions.Session"]


# ---- locks
def locked(name: str) -> dict[str, str]:
    """name -> version, of what the lock installs on this machine."""
    found = {}
    for line in (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([a-z0-9-]+)(?:\[.*\])?==([^ ;]+)(?: ; (.*?))?(?: \\)?$", line)
        if match and (match[3] is None or Marker(match[3]).evaluate(default_environment())):
            found[match[1]] = match[2]
    return found


ALL = sorted(path.stem for path in LOCKS.glob("*.txt"))


def test_locks_name_no_index_and_no_place():
    assert ALL == ["league", "run", "test", "test-5.17", "test-5.23", "torch"]
    for name in ALL:
        text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
        assert not re.search(r"https?:|file:|--index|--extra-index|--find-links|@ |^-e", text), name
        assert re.search(r"==", text) and not re.search(r"^[a-z0-9-]+ *[<>~]", text, re.MULTILINE)
        blocks = re.findall(r"^[a-z0-9][^\n]*(?:\n +[^\n]*)*", text, re.MULTILINE)
        hashed = {"--hash=sha256:" in block for block in blocks}
        assert hashed == ({False} if name == "torch" else {True}), name


@pytest.mark.parametrize("name", [n for n in ALL if n != "torch"])
def test_a_lock_holds_what_pyproject_asks_for(name):
    chosen = {"run": (), "league": ("plots", "quantized-cache")}.get(name, ("dev",))
    lines = list(PROJECT["dependencies"])
    for extra in chosen:
        lines += PROJECT["optional-dependencies"][extra]
    have = locked(name) | locked("torch")
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        found = have.get(wanted.name.lower().replace("_", "-"))
        assert found is not None, f"locks/{name}.txt has no {wanted.name}: make lock"
        assert wanted.specifier.contains(found), f"locks/{name}.txt: {wanted} is {found}: make lock"


def test_this_environment_is_the_locked_one():
    """The releases that these tests run with are those of the lock of this transformers."""
    release = ".".join(version("transformers").split(".")[:2])
    name = next((n for n in ("test", "test-5.23", "test-5.17")
                 if locked(n)["transformers"].startswith(f"{release}.")), None)  # fmt: skip
    assert name is not None, f"transformers {release} is in no lock"
    wrong = []
    of_torch = {p: v for p, v in locked("torch").items() if p in ("torch", "triton")}
    for package, wanted in (locked(name) | of_torch).items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "missing"
        if found.split("+")[0] != wanted:
            wrong.append(f"{package} {found}, locked {wanted}")
    assert wrong == [], "make setup"
