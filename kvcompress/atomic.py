"""Writing a file so that readers see the old one or the new one, whole, whatever happens.

What is written goes to a file beside the target and is renamed over it. The name beside it carries
the target's; an open lock tells the litter of a killed process from a living one's, and the next
write of the same target clears it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_MARK: Final = ".kvcompress-writing-"


class NotReplaceableError(OSError):
    """A target that is neither a regular file nor absent."""


def write_file(path: Path | str, data: str | bytes) -> None:
    """Put `data` (text as UTF-8) in the place of `path`.

    Raises:
        OSError: where it cannot be written; what was there stays.
        NotReplaceableError: for a directory, a device, a pipe or a socket.
    """
    with replacing(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write and read, which takes the place of `path` when the block ends well.

    A symbolic link stays, and what it leads to is replaced. The new file has the old one's
    permissions, or those that the umask gives.

    Raises:
        OSError: as `write_file`.
    """
    target = Path(os.path.realpath(path))
    mode = _replaceable(target, Path(path))
    _clear(target)
    staged, handle = _beside(target)
    try:
        if mode is not None:
            os.fchmod(handle, mode)
        with os.fdopen(handle, "w+b", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(staged, target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaceable(target: Path, named: Path) -> int | None:
    """Permissions of the file that is there, None where there is none."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "a directory",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
        }
        kind = kinds.get(stat.S_IFMT(mode), "no plain file")
        raise NotReplaceableError(f"{named} is {kind}; name a file")
    return stat.S_IMODE(mode)


def _beside(target: Path) -> tuple[Path, int]:
    """A new file beside the target, open and locked."""
    while True:
        staged = target.with_name(_prefix(target) + secrets.token_hex(4))
        handle = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(handle) and staged.exists():
            return staged, handle
        os.close(handle)  # another writer took it for litter before it was locked


def _prefix(target: Path) -> str:
    return f".{target.name}{_MARK}"


def _clear(target: Path) -> None:
    """Remove what killed writers of the same target left."""
    for left in target.parent.glob(_escaped(_prefix(target)) + "*"):
        try:
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if _lock(handle):
                left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    """`name` as a pattern that matches itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(handle: int) -> bool:
    """Lock an open file for as long as it is open; False where another process holds it."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
