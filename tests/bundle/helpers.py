"""Making and mending bundles by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvcompress.bundle import files, manifest
from kvcompress.bundle.write import ExportReport

Exported = Callable[[str], tuple[Path, ExportReport]]


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
