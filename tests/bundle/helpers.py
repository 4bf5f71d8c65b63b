"""Making and mending bundles by hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kvcompress.bundle import files, manifest, write
from kvcompress.bundle.expected import Expected
from kvcompress.bundle.verify import VerifyReport, verify
from kvcompress.bundle.write import ExportReport
from kvcompress.recipe import WeightScheme

Exported = Callable[[str], tuple[Path, ExportReport]]
Mixed = Callable[[tuple[WeightScheme, ...]], tuple[Path, ExportReport]]
MIXED: Final[tuple[WeightScheme, ...]] = ("bf16", "int8")  # weights of the two layers


@contextmanager
def checked_here() -> Iterator[None]:
    """Exports check what they wrote in this process.

    The fresh process that users get spends ten seconds on its imports. `test_write.py` has it check
    a bundle of every format; whatever else wants a bundle uses this.
    """

    def check(staged: Path, target: Path, expected: Expected) -> VerifyReport:
        with tempfile.TemporaryDirectory() as folder:
            expected.save(Path(folder) / "expected.safetensors")
            return verify(staged, Path(folder) / "expected.safetensors")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_check_in_fresh_process", check)
        yield


def relist(bundle: Path, **changes: object) -> None:
    """Let the manifest list the files as they are now, then apply `changes` to it."""
    path = bundle / manifest.MANIFEST
    data = json.loads(path.read_text())
    names = [name for name in files.tree(bundle) if name != manifest.MANIFEST]
    data["files"] = [entry.model_dump() for entry in files.digests(bundle, names)]
    stored_bytes = sum(file.stat().st_size for file in bundle.glob("*.safetensors"))
    data["weights"]["size_bytes"] = stored_bytes
    path.write_text(json.dumps({**data, **changes}))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
