"""How commands end: devices that are not there, streams that break, signals, kinds of errors."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer

from kvcompress.cli import app, common, ending
from kvcompress.errors import BundleError
from kvcompress.plan import Plan

REQUIRED = {
    "probe": ["m"],
    "doctor": ["m"],
    "inspect": ["p"],
    "profile": ["m", "-o", "out"],
    "export": ["p", "-o", "out"],
    "verify": ["b"],
    "eval": ["m"],
    "generate": ["b", "-p", "text"],
    "chat": ["b"],
    "league": ["m", "-o", "out"],
    "bench": ["m"],
}


def ended(capfd, *arguments):
    """(exit code, stdout, stderr)"""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        app.main([str(argument) for argument in arguments])
    return (stop.value.code, *capfd.readouterr())


def with_device():
    commands = typer.main.get_command(app.build()).commands
    return {name for name, c in commands.items() if any(p.name == "device" for p in c.params)}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        *((name, "give cpu, cuda, cuda:N or auto") for name in ("gpu", "mps", "meta", "xpu:0")),
        *((name, "give cpu, cuda, cuda:N or auto") for name in ("cuda:", "cuda:x", "cuda:-1", "")),
        ("cuda", "no device was found"),
        ("cuda:7", "no device was found"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(capfd, monkeypatch, device, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert with_device() == set(REQUIRED)
    for command, required in REQUIRED.items():
        code, out, err = ended(capfd, command, *required, "--device", device)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --device {device}: ") and message in err
        assert err.count("\n") == 1


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "auto", "cuda", "cuda:1"):
        assert common.usable_device(device) == device == common.usable_map(device)
    assert common.usable_map("balanced") == "balanced"
    with pytest.raises(common.KVCompressError, match="cuda:2: the last of 2 devices is cuda:1"):
        common.usable_device("cuda:2")
    assert common.chosen("auto") == "cuda"


# kinds of errors


class OutOfMemoryError(RuntimeError):
    """As torch's, which is a RuntimeError."""


class SafetensorError(Exception):
    """As the library's."""


def not_utf8():
    try:
        b"caf\xe9".decode()
    except UnicodeDecodeError as error:
        return error


def not_a_plan():
    try:
        Plan.model_validate({"heads": 3})
    except ValueError as error:
        return error


USERS = {
    "ours": (BundleError("b: damaged;\n  export again"), "b: damaged; export again"),
    "a bad argument": (ValueError("'8GB' is no size"), "'8GB' is no size"),
    "not UTF-8": (not_utf8(), "can't decode byte 0xe9"),
    "a schema": (not_a_plan(), "Plan: model: Field required; heads: Input should be"),
    "no such file": (FileNotFoundError(errno.ENOENT, "No such file", "x"), "x: No such file"),
    "no rights": (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "b"), "b: No space left; free some"),
    "no network": (OSError("cannot reach the hub"), "cannot reach the hub"),
    "a package": (ModuleNotFoundError("no", name="lm_eval"), "package lm_eval, which is not"),
    "memory": (MemoryError("no more"), "out of memory"),
    "memory of a GPU": (OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; give a"),
    "memory of a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory"),
    "a weights file": (SafetensorError("header too large"), "weights file .*header too large"),
    "control characters": (BundleError("\x1b[31mred\x07 \udce9"), r"\\x1b\[31mred\\x07 \\udce9$"),
}
OURS = {
    "a key": KeyError("ours"),
    "a type": TypeError("ours"),
    "an assertion": AssertionError("ours"),
    "torch": RuntimeError("shapes do not match"),
    "a module of ours": ModuleNotFoundError("no", name="kvcompress.missing"),
}


@pytest.fixture
def raising(monkeypatch):
    def install(error):
        def command() -> None:
            raise error

        monkeypatch.setitem(app.COMMANDS, "profile", command)

    return install


@pytest.mark.parametrize("kind", USERS)
def test_what_a_user_causes_is_one_line(capfd, raising, kind):
    error, message = USERS[kind]
    raising(error)
    code, out, err = ended(capfd, "profile")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(f"^error: .*{message}", err.strip()), err
    with pytest.raises(type(error), match=re.escape(str(error))):
        app.main(["--traceback", "profile"])


@pytest.mark.parametrize("kind", OURS)
def test_a_bug_is_one_line_that_says_so(capfd, raising, kind):
    error = OURS[kind]
    raising(error)
    code, out, err = ended(capfd, "profile")
    assert (code, out) == (70, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: this is a bug in kvcompress ({type(error).__name__}: ")
    assert err.endswith(
        "run it again as kvcompress --traceback profile … and report what it prints\n"
    )
    with pytest.raises(type(error), match=re.escape(str(error))):
        app.main(["--traceback", "profile"])


def test_a_bug_names_the_place_in_our_code():
    try:
        Plan.load(3)  # type: ignore[arg-type]
    except TypeError as error:
        assert " at plan.py line " in ending.of_ours(error, "inspect")


def test_bytes_on_the_command_line_that_are_no_text(capfd):
    code, out, err = ended(capfd, "generate", "b", "-p", "caf\udce9")
    assert (code, out) == (2, "")
    assert err.startswith("error: argument b'caf\\xe9' is not UTF-8") and err.count("\n") == 1


# streams and signals


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    from tests.profile.test_solve import PROFILE, solve

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(solve(PROFILE).to_json())
    return path


def program(arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "kvcompress", *map(str, arguments)],
        stderr=subprocess.PIPE,
        timeout=300,
        **settings,
    )


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_has_gone_ends_it_quietly(plan_file, more):
    read, write = os.pipe()
    os.close(read)
    done = program(["inspect", plan_file, *more], stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "PLAN"]])
def test_a_full_stdout_is_one_line(plan_file, arguments):
    arguments = [plan_file if word == "PLAN" else word for word in arguments]
    with open("/dev/full", "wb") as full:
        done = program(arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr


def closing(number):
    return lambda: os.close(number)


def test_closed_streams():
    done = program(["doctor"], preexec_fn=closing(1))
    assert done.returncode == 2
    assert done.stderr == b"error: standard output is closed; send it to a file, or to /dev/null\n"
    for number in (0, 2):
        done = program(["--help"], preexec_fn=closing(number), stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"kvcompress" in done.stdout


def test_text_that_the_terminal_cannot_show_is_escaped(plan_file):
    plan = Plan.load(plan_file).model_copy(update={"target": "a café"})
    path = plan_file.parent / "cafe.json"
    path.write_text(plan.to_json())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = program(["inspect", path], stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"a caf\\xe9" in done.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_cleans_up_and_says_how_to_go_on(capfd, monkeypatch, name):
    number, cleaned = getattr(signal, name), []

    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)  # never waits for a signal that is ignored
        finally:
            cleaned.append(True)

    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    kept = signal.signal(number, before)  # a shell in the background has some of them ignored
    monkeypatch.setitem(app.COMMANDS, "profile", command)
    try:
        code, _, err = ended(capfd, "profile")
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, kept)
    assert code == 128 + number and cleaned
    assert err == f"stopped; {app.GO_ON['profile']}\n"
