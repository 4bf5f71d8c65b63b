"""Write the lock files: every package that a set-up installs, by exact version.

python tools/lock.py [--uv COMMAND]

`make lock` runs it with uv in an environment of its own. torch and what its CUDA build brings lie
in a file of their own, without hashes: torch has several builds of one version, and machines take
different ones. Everything else is listed with the hashes of all its files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
TORCH = "torch==2.13.0"
# file -> extras, and pins that differ from the newest of the range
SETS: dict[str, tuple[list[str], list[str]]] = {
    "run": ([], []),
    "test": (["dev"], []),
    "league": (["plots", "quantized-cache"], []),
    "test-5.23": (["dev"], ["transformers==5.23.0"]),
    "test-5.17": (["dev"], ["transformers==5.17.0"]),
}
# what only some builds of torch ask for
OF_TORCH = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)(\[|==)")
HEAD = """\
# Written by `make lock`; do not edit.{more}
"""
HASHED = """
# Every package but torch and what it brings (torch.txt), with the hashes of its version's files.
# pip install --no-deps --require-hashes -r {name}.txt"""
UNHASHED = """
# torch and what its CUDA build on Linux brings, as constraints: pip install -c torch.txt torch
# No hashes: a machine takes the build, CPU or CUDA, that its package index has."""


def resolve(uv: str, extras: list[str], pins: list[str]) -> list[str]:
    """The packages of a set, each as one block of lines."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--upgrade"]
    command += [word for extra in extras for word in ("--extra", extra)]
    command += ["--constraint", "-", "pyproject.toml"]
    text = "\n".join([TORCH, *pins]) + "\n"
    done = subprocess.run(
        command, cwd=ROOT, input=text, text=True, check=True, stdout=subprocess.PIPE
    )
    return re.findall(r"^[a-z0-9].*(?:\n .*)*", done.stdout, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--uv", default="uv", help="the command to run")
    uv = parser.parse_args().uv
    LOCKS.mkdir(exist_ok=True)
    of_torch: set[str] = set()
    for name, (extras, pins) in SETS.items():
        blocks = resolve(uv, extras, pins)
        of_torch |= {b.split(" \\")[0] for b in blocks if OF_TORCH.match(b)}
        kept = [b for b in blocks if not OF_TORCH.match(b)]
        head = HEAD.format(more=HASHED.format(name=name))
        (LOCKS / f"{name}.txt").write_text(head + "\n".join(kept) + "\n", encoding="utf-8")
        print(f"locks/{name}.txt: {len(kept)} packages")
    (LOCKS / "torch.txt").write_text(
        HEAD.format(more=UNHASHED) + "\n".join(sorted(of_torch)) + "\n", encoding="utf-8"
    )
    print(f"locks/torch.txt: {len(of_torch)} packages")


if __name__ == "__main__":
    main()
