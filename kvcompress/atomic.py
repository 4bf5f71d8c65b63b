"""Writing a file or a directory so that readers see the old one or the new one, whole.

A writer works under a hidden name beside the target and renames it into place in one step. It holds
a lock on the hidden file while it lives, so the next writer of the same target can tell what a
killed process left from what a living one is writing, and removes the former. Of two writers of a
file the last one wins. A directory has one writer at a time; a second one gets an error.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_MARK: Final = ".kvcompress-writing-"
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class NotReplaceableError(OSError):
    """Something else lies at the target: a directory where a file is to be put, or a device."""


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


@contextmanager
def directory(path: Path | str) -> Iterator[Path]:
    """An empty directory to build in; when the block ends without an error it takes `path`'s place.

    A directory that was there is replaced as a whole and then removed; whether it may be is for the
    caller to decide. Folders above `path` are made.

    Raises:
        OSError: where it cannot be built or put in place, where another process is building it, or
            where something else than a directory has that name.
    """
    target = Path(os.path.realpath(path))
    _replaceable(target, Path(path), stat.S_IFDIR)
    target.parent.mkdir(parents=True, exist_ok=True)
    _finish_two_steps(target)
    staged, handle = _create_directory(target)
    try:
        yield staged
        _sync_tree(staged)
        _put_in_place(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder, or the bytes of a file, are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaceable(target: Path, named: Path, wanted: int = stat.S_IFREG) -> int | None:
    """Permissions of the file or directory that is there, None where there is none."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_IFMT(mode) != wanted:
        kinds = {
            stat.S_IFREG: "a file",
            stat.S_IFDIR: "a directory",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
        }
        kind = kinds.get(stat.S_IFMT(mode), "no plain file")
        raise NotReplaceableError(f"{named} is {kind}; name {kinds[wanted]}")
    return stat.S_IMODE(mode)


def _beside(target: Path) -> tuple[Path, int]:
    """A new file beside the target, open and locked."""
    while True:
        staged = target.with_name(_prefix(target) + secrets.token_hex(4))
        handle = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(handle) and staged.exists():
            return staged, handle
        os.close(handle)  # another writer removed it as a dead process's before it was locked


def _prefix(target: Path) -> str:
    return f".{target.name}{_MARK}"


def _clear(target: Path) -> None:
    """Remove the hidden files that killed writers of the same target left."""
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


# ---- directories
def _create_directory(target: Path) -> tuple[Path, int]:
    """A new hidden directory, locked; an error where another process is writing one."""
    staged = target.with_name(f".{target.name}{_MARK}new")
    while True:
        try:
            staged.mkdir()
        except FileExistsError:
            _clear_directory(staged, target)
            continue
        try:
            handle = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if _lock(handle) and _is(staged, handle):
            return staged, handle
        os.close(handle)


def _clear_directory(staged: Path, target: Path) -> None:
    """Remove the hidden directory of a dead process.

    Raises:
        OSError: where a living one holds it.
    """
    try:
        handle = os.open(staged, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if not _lock(handle):
            told = "another process is writing it; wait for that one, or give another name"
            raise OSError(errno.EBUSY, told, str(target))
        if _is(staged, handle):
            shutil.rmtree(staged)
    finally:
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    """Whether `path` still names what `handle` has open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


# ---- putting a directory in place
def _put_in_place(staged: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        staged.rename(target)
        return
    old = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(
            old
        )  # it gets the hidden name in a moment, and the lock keeps others from clearing it
        if _exchange(staged, target):
            shutil.rmtree(staged, ignore_errors=True)
        else:
            _replace_in_two_steps(staged, target)
    finally:
        os.close(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.kvcompress-old")


def _replace_in_two_steps(staged: Path, target: Path) -> None:
    """For file systems that cannot exchange two names."""
    old = _old(target)
    target.rename(old)
    try:
        staged.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _finish_two_steps(target: Path) -> None:
    """Finish for a process that was killed: between the two steps the old directory goes back,
    after them it is removed."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            sync_folder(Path(folder, name))
        sync_folder(Path(folder))
