"""Files of a bundle: listing, hashing, and putting a finished directory in place in one step."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvcompress.bundle.manifest import FileEntry
from kvcompress.errors import BundleError

_HASH_THREADS: Final = 4
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def tree(root: Path) -> dict[str, Path]:
    """Every file below `root` by its relative path, hidden ones at the top left out.

    Hidden top-level entries (.git, .gitattributes, .cache) belong to the tool that carries the
    bundle around; no loader reads them.

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


def settle(root: Path) -> None:
    """Give all files the same permissions and wait until the whole tree is on the disk."""
    paths = tree(root)
    mode = stat.S_IMODE((root / "config.json").stat().st_mode)
    for path in paths.values():
        path.chmod(mode)  # safetensors writes 0600 whatever the umask says
        _fsync(path)
    for folder in {root, *(path.parent for path in paths.values())}:
        _fsync(folder)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory beside `out` to build in, gone afterwards unless it was moved into place.

    A killed run leaves it behind; the next one for the same `out` removes it. The lock tells a
    dead run's directory from a living one's.
    """
    import fcntl

    out.parent.mkdir(parents=True, exist_ok=True)
    _clean(out)
    staged = out.with_name(_prefix(out) + secrets.token_hex(4))
    staged.mkdir()
    lock = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staged
    finally:
        os.close(lock)
        shutil.rmtree(staged, ignore_errors=True)


def put_in_place(staged: Path, out: Path) -> None:
    """Make `staged` the new `out`; an existing `out` is replaced in one step and then removed."""
    if not out.exists() or not any(out.iterdir()):
        staged.rename(out)
    elif _exchange(staged, out):
        shutil.rmtree(staged, ignore_errors=True)
    else:
        _replace_in_two_steps(staged, out)
    _fsync(out.parent)


def _replace_in_two_steps(staged: Path, out: Path) -> None:
    """For file systems that cannot exchange two names; `_clean` mends a kill in between."""
    old = _old(out)
    out.rename(old)
    try:
        staged.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)


def _clean(out: Path) -> None:
    """Undo what a killed run for the same `out` left."""
    import fcntl

    old = _old(out)
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    for left in out.parent.iterdir():
        if not left.name.startswith(_prefix(out)):
            continue
        try:
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # a living export holds it
        finally:
            os.close(handle)


def _prefix(out: Path) -> str:
    return f".{out.name}.kvcompress-export-"


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.kvcompress-old")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
