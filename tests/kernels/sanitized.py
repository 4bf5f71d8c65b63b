"""The C kernels with checked indices, under AddressSanitizer and UBSan, for tests.

    python -m tests.kernels.sanitized pytest -q tests/runtime/test_fused.py

builds them and runs a module of Python with them. Python itself is not built so: the sanitizer's
library is loaded before it, and what lies in an array of torch's is known by its `malloc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
LIBRARY = "KVC_TEST_KERNELS"  # read by tests/conftest.py and tests/fuzz/run.py, not by the package
FLAGS = [
    *("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer", "-DKVC_CHECKED", "-fPIC", "-shared"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function", "-Werror"),
]


def compiler() -> str | None:
    """gcc, whose sanitizers' libraries lie beside it; None where there is none."""
    found = shutil.which("gcc")
    return found if found and _runtime(found, "asan").is_file() else None


def _runtime(gcc: str, name: str) -> Path:
    told = subprocess.run([gcc, f"-print-file-name=lib{name}.so"], capture_output=True, text=True)
    return Path(told.stdout.strip())


def build() -> Path:
    """The library; made anew where a source is newer.

    Raises:
        RuntimeError: without gcc and its sanitizers.
    """
    gcc = compiler()
    if gcc is None:
        raise RuntimeError("the sanitizer build needs gcc with libasan and libubsan")
    path = BUILD / "kernels.so"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    sources = [ROOT / name for name in extension["sources"]]
    all_of = [*sources, *(ROOT / name for name in extension["depends"]), Path(__file__)]
    if path.is_file() and path.stat().st_mtime > max(p.stat().st_mtime for p in all_of):
        return path
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run([gcc, *FLAGS, *sources, "-o", path, "-lm"], check=True)
    return path


def environment() -> dict[str, str]:
    """What a process needs to run with them."""
    path, gcc = build(), compiler()
    assert gcc is not None
    return {
        LIBRARY: str(path),
        "LD_PRELOAD": f"{_runtime(gcc, 'asan')} {_runtime(gcc, 'ubsan')}",
        # Python and torch keep what they have; too large a request is an error, not the end
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    command = [sys.executable, "-m", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment()}).returncode


if __name__ == "__main__":
    sys.exit(main())
