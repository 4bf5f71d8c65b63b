"""Files and directories that appear whole, or not at all.

What is written lies beside its target, as ``.<name>.kvcompress-new``, until every byte is on the
disk; then it takes the target's name in one step. Its writer holds a lock on it, which dies with
the process: so the next writer can tell what a killed one left, and clears it, from what a living
one is still at.

A symbolic link stays and what it points to is replaced. Nothing but plain files and directories
ever is: a device or a pipe of the target's name is refused. Every refusal is an ``OSError`` whose
``strerror`` says why.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a plain file",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link that leads nowhere",
}


def write_file(path: Path | str, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file; one that was there is replaced, and keeps its permissions.

    Args:
        content: text is written as UTF-8; a function is given a file that can seek.

    Raises:
        OSError: where it cannot be written, or something else than a plain file has that name. A
            file that was there stays as it was.
    """
    target = _target(Path(path), stat.S_IFREG)
    staged, handle = _create_file(target)
    with os.fdopen(handle, "r+b") as file:  # closing it gives the lock free
        try:
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
            else:
                content(file)
            file.flush()
            if target.exists():
                os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
            os.fsync(handle)
            staged.rename(target)
        except BaseException:
            staged.unlink()
            raise
    _sync(target.parent)


@contextmanager
def directory(path: Path | str) -> Iterator[Path]:
    """An empty directory to build in; when the block ends without an error it takes `path`'s place.

    A directory that was there is replaced as a whole and then removed; whether it may be is for the
    caller to decide. Folders above `path` are made.

    Raises:
        OSError: where it cannot be built or put in place, where another process is building it, or
            where something else than a directory has that name.
    """
    target = _target(Path(path), stat.S_IFDIR)
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
    _sync(target.parent)


# ---- the target and what is built beside it
def _target(path: Path, kind: int) -> Path:
    """The place that `path` names, links followed, where nothing or a `kind` lies."""
    target = Path(os.path.realpath(path))
    try:
        found = stat.S_IFMT(target.lstat().st_mode)
    except FileNotFoundError:
        return target
    if found != kind:
        raise OSError(
            errno.EINVAL,
            f"{_KINDS.get(found, 'something special')} has that name, and only {_KINDS[kind]} is "
            "replaced; give another name",
            str(path),
        )
    return target


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.kvcompress-new")


def _create_file(target: Path) -> tuple[Path, int]:
    """A new file of our own, locked; waits for another process that is writing it."""
    staged = _staged(target)
    while True:
        try:
            handle = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            _clear(staged, target, fcntl.LOCK_EX)
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _is(staged, handle):
            return staged, handle
        os.close(handle)  # cleared by another process before it was locked


def _create_directory(target: Path) -> tuple[Path, int]:
    """A new directory of our own, locked; refused where another process has one."""
    staged = _staged(target)
    while True:
        try:
            staged.mkdir()
        except FileExistsError:
            _clear(staged, target, fcntl.LOCK_EX | fcntl.LOCK_NB)
            continue
        try:
            handle = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _is(staged, handle):
            return staged, handle
        os.close(handle)


def _clear(staged: Path, target: Path, lock: int) -> None:
    """Remove what a dead process left.

    Raises:
        OSError: where a living one holds it and `lock` does not wait.
    """
    try:
        handle = os.open(staged, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(handle, lock)
        if not _is(staged, handle):
            return
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            shutil.rmtree(staged)
        else:
            staged.unlink()
    except BlockingIOError:
        told = "another process is writing it; wait for that one, or give another name"
        raise OSError(errno.EBUSY, told, str(target)) from None
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
        fcntl.flock(old, fcntl.LOCK_EX)  # under the staged name in a moment: nobody else clears it
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
    """Mend a kill between the two steps, and clear what one after them left."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
