"""Build the wheel and the source distribution, and install each in a clean environment.

python tools/check_install.py [--pythons python3.11,python3.12] [--with-torch]

For every Python that is here: the installed package imports, runs `kvcompress --help`, and has its
compiled kernels. Without --with-torch the environment borrows nothing and installs nothing else, so
only what needs neither torch nor transformers runs; with it, `pip install` resolves everything.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIGHT = ["typer", "pydantic", "pyyaml", "rich", "packaging"]
LOOK = """
import glob, pathlib, kvcompress
folder = pathlib.Path(kvcompress.__file__).parent
built = list((folder / "kernels" / "cpu").glob("_kernels*.so"))
assert len(built) == 1, "the C kernels were not built"
import ctypes
ctypes.CDLL(str(built[0]))
print(kvcompress.__version__, folder)
"""
DOCTOR = "from kvcompress.kernels.cpu.library import library; assert library() is not None"


def run(*words: str | Path, **more: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return str(done.stdout)


def works(python: str) -> bool:
    """Whether a command is a Python that runs."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def build(python: str, folder: Path) -> list[Path]:
    """Wheel and source distribution of the committed files, with all that they have to hold.

    A wheel holds compiled kernels and is for the Python that built it.
    """
    source = folder / "source"
    run("git", "clone", "--quiet", ROOT, source)
    builder = folder / "builder"
    run(python, "-m", "venv", builder)
    run(builder / "bin/pip", "install", "--quiet", "build")
    run(builder / "bin/python", "-m", "build", "--quiet", "-o", folder / "dist", source)
    wheel, sdist = sorted((folder / "dist").iterdir(), key=lambda path: path.suffix != ".whl")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    held = set(run("git", "-C", source, "ls-files", "kvcompress").split())
    assert len(held) > 250
    for package, files in ((wheel, in_wheel), (sdist, in_sdist)):
        assert held <= files, f"{package.name} lacks {sorted(held - files)}"
    assert {"LICENSE", "README.md", "pyproject.toml"} <= in_sdist
    return [wheel, sdist]


def install(python: str, package: Path, with_torch: bool, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    if with_torch:
        run(*pip, package)
    else:
        run(*pip, *LIGHT)
        run(*pip, "--no-deps", package)
    print(python, package.name, run(folder / "bin/python", "-c", LOOK, cwd="/").strip())
    assert "kvcompress" in run(folder / "bin/kvcompress", "--help")
    if with_torch:
        run(folder / "bin/python", "-c", DOCTOR, cwd="/")
        print(run(folder / "bin/kvcompress", "doctor"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pythons", default="python3.11,python3.12,python3.13")
    parser.add_argument("--with-torch", action="store_true", help="install every dependency too")
    arguments = parser.parse_args()
    for python in arguments.pythons.split(","):
        if not works(python):
            print(f"{python} is not here")
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for package in build(python, folder):
                install(python, package, arguments.with_torch, folder / "venv")


if __name__ == "__main__":
    main()
