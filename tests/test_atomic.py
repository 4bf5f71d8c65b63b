"""One writer for every file: the old one or the new one, whole, and nothing left behind."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from kvcompress import atomic
from kvcompress.atomic import NotReplaceableError, directory, replacing, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "plan*[1].json"
    old = os.umask(0o027)
    try:
        write_file(path, "ü\n")
    finally:
        os.umask(old)
    assert path.read_bytes() == "ü\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    write_file(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == [path.name]


def test_what_goes_wrong_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_file(path, "old")
    with pytest.raises(KeyboardInterrupt, match="stop"), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt("stop")
    assert path.read_text() == "old" and names(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError, match="no_such"):
        write_file(tmp_path / "no_such" / "a", "x")


@pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "device", "link to a device"])
def test_only_a_plain_file_is_replaced(kind, tmp_path):
    path = tmp_path / "target"
    word = kind
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path, word = tmp_path / "link", "device"
        path.symlink_to("/dev/full")
        if kind == "device":
            path = path.resolve()
    before = os.stat(path).st_mode
    with pytest.raises(NotReplaceableError, match=f"{path.name} is a {word}; name a file"):
        write_file(path, "x")
    assert os.stat(path).st_mode == before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "there" / "file")
    for text in ("one", "two"):
        write_file(path, text)
        assert path.is_symlink() and (tmp_path / "there" / "file").read_text() == text
    assert names(tmp_path / "there") == ["file"]


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.communicate()


WRITER = """
import sys, time
from kvcompress.atomic import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("open", flush=True)
    time.sleep(60)
"""


def test_litter_of_a_killed_writer_is_cleared_and_a_living_ones_is_not(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "ab.json"
    write_file(path, "old")
    writers = []
    for target in (path, path, other):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "open\n"
        writers.append(child)
    killed, alive, elsewhere = writers
    for child in (killed, elsewhere):
        kill(child)
    assert len(names(tmp_path)) == 4  # the file and three that were being written
    write_file(path, "new")
    assert path.read_text() == "new"
    left = [name for name in names(tmp_path) if name != "a.json"]
    assert len(left) == 2 and left[1].startswith(".ab.json.")  # another target's litter is not ours
    kill(alive)
    write_file(path, "newer")
    write_file(other, "newer")
    assert names(tmp_path) == ["a.json", "ab.json"]


def test_two_writers_of_one_file_at_once(tmp_path):
    path = tmp_path / "a"
    code = (
        "import sys\nfrom kvcompress.atomic import write_file\n"
        "for i in range(200): write_file(sys.argv[1], b'x' * 5000 + b'%d' % i)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    seen = 0
    while any(child.poll() is None for child in children):
        if path.exists():
            assert path.read_bytes()[:5000] == b"x" * 5000
            seen += 1
        time.sleep(0.01)
    assert [child.returncode for child in children] == [0, 0] and seen
    assert names(tmp_path) == ["a"]


# ---- directories
def build(path, text):
    with directory(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "text").write_text(text)


def content(path):
    return (path / "inner" / "text").read_text()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_is_made_and_replaced(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    path = tmp_path / "above" / "made"
    for text in ("one", "two"):
        build(path, text)
        assert content(path) == text
    with pytest.raises(KeyboardInterrupt, match="stop"), directory(path) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt("stop")
    assert content(path) == "two" and names(path.parent) == ["made"]


def test_a_kill_between_the_two_steps_is_mended(tmp_path):
    path = tmp_path / "made"
    build(path, "old")
    path.rename(tmp_path / ".made.kvcompress-old")
    with pytest.raises(KeyboardInterrupt, match="stop"), directory(path):
        raise KeyboardInterrupt("stop")
    assert content(path) == "old" and names(tmp_path) == ["made"]


@pytest.mark.parametrize("kind", ["file", "pipe", "device"])
def test_only_a_directory_is_replaced_by_one(kind, tmp_path):
    path = tmp_path / "target"
    if kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("kept")
    before = os.stat(path).st_mode
    with pytest.raises(NotReplaceableError, match=f"target is a {kind}; name a directory"):
        build(path, "x")
    assert os.stat(path).st_mode == before and names(tmp_path) == ["target"]


def test_a_link_to_a_directory_stays(tmp_path):
    path = tmp_path / "link"
    path.symlink_to("there")
    for text in ("one", "two"):
        build(path, text)
        assert path.is_symlink() and content(tmp_path / "there") == text
    assert names(tmp_path) == ["link", "there"]


BUILDER = """
import sys, time
from kvcompress.atomic import directory
with directory(sys.argv[1]) as folder:
    (folder / "half").touch()
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_directory_has_one_builder_and_a_killed_ones_litter_is_cleared(tmp_path):
    path = tmp_path / "made"
    build(path, "old")
    child = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "open\n"
    with pytest.raises(OSError, match="another process is writing it; wait for that one"):
        build(path, "second")
    kill(child)
    assert content(path) == "old" and len(names(tmp_path)) == 2
    build(path, "third")
    assert content(path) == "third" and names(tmp_path) == ["made"]
