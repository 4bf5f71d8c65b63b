"""Runs tests/interpreted in processes of their own, where Triton is an interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra: gpu)"
)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets itself"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
