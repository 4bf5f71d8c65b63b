"""Files of a bundle: listing and hashing."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from kvcompress.bundle.manifest import FileEntry
from kvcompress.errors import BundleError

_HASH_THREADS: Final = 4


def tree(root: Path) -> dict[str, Path]:
    """Every file below `root` by its relative path, hidden ones at the top left out.

    Hidden entries at the top (.git, .gitattributes, .cache) belong to git or to the Hub's client,
    and no loader reads them.

    Raises:
        BundleError: for a link, a socket or anything else that is not a plain file.
    """
    found: dict[str, Path] = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        for entry in sorted(folder.iterdir()):
            if folder == root and entry.name.startswith("."):
                continue
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                folders.append(entry)
            elif stat.S_ISREG(mode):
                found[entry.relative_to(root).as_posix()] = entry
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
                raise BundleError(
                    f"{entry}: {kind}; a bundle holds plain files only (copy it with cp -rL)"
                )
    return found


def digest(root: Path, path: str) -> FileEntry:
    """Size and sha256 of one file."""
    with (root / path).open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path=path, size_bytes=file.tell(), sha256=value)


def digests(root: Path, paths: Iterable[str]) -> tuple[FileEntry, ...]:
    """`digest` of each path, in order of the paths' names."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return tuple(pool.map(lambda path: digest(root, path), sorted(paths)))


def same_permissions(root: Path) -> None:
    """Give all files the permissions of config.json: safetensors writes 0600 for any umask."""
    mode = stat.S_IMODE((root / "config.json").stat().st_mode)
    for path in tree(root).values():
        path.chmod(mode)
