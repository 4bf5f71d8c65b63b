"""What is written atomically is whole or not there, replaces only its kind, leaves no litter."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcompress import atomic

ROOT = Path(__file__).parents[1]


def build(path: Path, text: str) -> None:
    """`text` as a file, or in a directory, whichever `path` names."""
    if path.suffix == ".file":
        atomic.write_file(path, text)
        return
    with atomic.directory(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "text").write_text(text)


def content(path: Path) -> str:
    return (path / "inner" / "text" if path.is_dir() else path).read_text()


@pytest.fixture(params=["x.file", "x.folder"])
def target(request, tmp_path) -> Path:
    return tmp_path / request.param


def test_the_new_takes_the_place_of_the_old(target, tmp_path):
    build(target, "old")
    assert content(target) == "old"
    build(target, "new")
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_function_may_seek(tmp_path):
    def fill(file) -> None:
        file.write(b"..cd")
        file.seek(0)
        file.write(b"ab")

    atomic.write_file(tmp_path / "x", fill)
    assert (tmp_path / "x").read_bytes() == b"abcd"


def test_permissions_stay(tmp_path):
    path = tmp_path / "x.file"
    build(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044 & ~_umask()
    path.chmod(0o640)
    build(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make(kind: str, path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "directory" and path.suffix == ".file":
        path.mkdir()
    else:
        path.write_text("kept")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fifo", "a named pipe"),
        ("socket", "a socket"),
        ("device", "a character device"),
        ("loop", "a symbolic link that leads nowhere"),
        ("directory", "a directory|a plain file"),
    ],
)
def test_only_its_own_kind_is_replaced(kind, words, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    target = Path(target.name)
    try:
        make(kind, target)
    except PermissionError:
        pytest.skip("only root makes a device")
    before = target.lstat()
    with pytest.raises(OSError, match=f"({words}) has that name, and only .* is replaced"):
        build(target, "new")
    assert target.lstat().st_mode == before.st_mode
    assert target.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [tmp_path / target]


def test_dev_full_stays_a_device():
    with pytest.raises(OSError, match="a character device has that name"):
        atomic.write_file("/dev/full", "x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_link_stays_and_what_it_points_to_is_replaced(target, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(target.name)
    for text in ("first", "second"):  # it points to nothing first
        if target.suffix == ".file":
            atomic.write_file(link, text)
        else:
            with atomic.directory(link) as folder:
                (folder / "inner").mkdir()
                (folder / "inner" / "text").write_text(text)
        assert link.is_symlink()
        assert content(target) == text
    assert sorted(tmp_path.iterdir()) == sorted([link, target])


def test_a_failure_leaves_the_old(target, tmp_path, monkeypatch):
    build(target, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            build(target, "new")
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


KILLED = """
import sys, time
from pathlib import Path
from kvcompress import atomic
target = Path(sys.argv[1])
def wait(file):
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    time.sleep(600)
if target.suffix == ".file":
    atomic.write_file(target, wait)
with atomic.directory(target) as folder:
    with (folder / "half").open("wb") as file:
        wait(file)
"""


def start(target: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, target], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_the_litter_of_a_killed_writer_is_cleared_by_the_next(target, tmp_path):
    build(target, "old")
    end(start(target))
    assert len(list(tmp_path.iterdir())) == 2
    assert content(target) == "old"
    build(target, "new")
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_living_builder_of_a_directory_is_left_alone_and_the_second_is_told(tmp_path):
    target = tmp_path / "x.folder"
    living = start(target)
    try:
        with pytest.raises(OSError, match="another process is writing it; wait for that one"):
            build(target, "new")
        assert (tmp_path / ".x.folder.kvcompress-new" / "half").exists()
    finally:
        end(living)
    build(target, "new")
    assert content(target) == "new"


def test_a_second_writer_of_a_file_waits(tmp_path):
    target = tmp_path / "x.file"
    living = start(target)
    code = f"from kvcompress import atomic; atomic.write_file({str(target)!r}, 'second')"
    second = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    time.sleep(0.3)
    assert second.poll() is None
    end(living)
    assert second.wait(timeout=20) == 0
    assert content(target) == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_without_an_exchange_of_names_a_directory_is_replaced_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "x.folder"
    for text in ("old", "new"):
        build(target, text)
        assert content(target) == text
    assert list(tmp_path.iterdir()) == [target]
    target.rename(tmp_path / ".x.folder.kvcompress-old")  # killed between the two
    with pytest.raises(ValueError, match="no more"), atomic.directory(target):
        raise ValueError("no more")
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]
