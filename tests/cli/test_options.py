"""No option is silently ignored: each changes what a command does in each way of using it, or is
refused there."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import typer

from kvcompress.bundle.verify import VerifyReport
from kvcompress.cli import app
from kvcompress.cli import progress as progress_of
from kvcompress.cli.progress import progress
from kvcompress.recipe import BytesPolicy, Recipe, UniformPolicy
from tests.profile.test_solve import PROFILE

RECIPE = "policy: {kind: bytes, keep_ratio: 0.3}\n"
# the ways of using a command, by what stands on its command line
MODES = {
    "demo": [""],
    "probe": ["m", "m --random-weights"],
    "profile": ["m -o out"],
    "plan": ["bytes -o out/p", "uniform -o out/p", "bytes -r recipe.yaml -o out/p"],
    "export": ["p -o out", "p -o out --plan plan.json", "p -o out -r recipe.yaml"],
    "inspect": ["p", "b --verify"],
    "verify": ["b"],
    "eval": ["m", "m --workloads hidden", "m --harness task --plan plan.json"],
    "generate": ["b -p text", "b -p text --temperature 1"],
    "chat": ["b", "b --temperature 1"],
    "league": ["m -o out --recipes recipes", "--render league.json"],
    "doctor": ["", "plan.json", "m", "m --random-weights"],
    "bench": ["m"],
}
VALUES = {
    "out": "other",
    "quick": None,
    "random_weights": None,
    "layers": "1",
    "device": "cuda:1",
    "recipe": "recipe.yaml",
    "data": "data.txt",
    "mix": "notes=1",
    "dtype": "float32",
    "also": "heads",
    "memory_limit": "64GiB",
    "memory": "1MiB",
    "keep_ratio": "0.5",
    "recovery": "0.5",
    "for_": "vllm",
    "context": "96",
    "batch": "3",
    "verify": None,
    "plan": "plan.json",
    "weights": "nf4",
    "model": "m2",
    "overwrite": None,
    "tasks": "count",
    "workloads": "second_turn",
    "harness": "other_task",
    "task_dir": "folder",
    "limit": "7",
    "samples": "5",
    "windows": "3",
    "text": "text.txt",
    "seed": "9",
    "prompt": "another",
    "raw": None,
    "system": "Be brief.",
    "max_new_tokens": "3",
    "temperature": "0.5",
    "protect": "0:3",
    "recipes": "recipes2",
    "points": "1/3",
    "only": "reference",
    "storage": "int4",
    "profile": "given",
    "jobs": "2",
    "machine": "mine",
    "any_code": None,
    "finished": None,
    "render": "league.json",
    "peers": "static",
    "rounds": "2",
    "steps": "2",
    "threads": "3",
    "fill": "prompt",
    "malloc": "default",
}


# what may take long, and so shows how far it is
LONG = {
    *("demo.run.run", "runtime.check.probe.probe", "profile.source.load_model", "bundle.load.load"),
    *("profile.source.load_source", "profile.run.run_and_plan", "bundle.write.export"),
    *("bundle.verify.verify", "evaluate.suite.make_suite", "evaluate.compare.compare"),
    *("evaluate.workloads.make_workloads", "evaluate.workloads_table.compare_workloads"),
    *("evaluate.harness.run_harness", "league.run.run_league", "bench.run.bench"),
    *("profile.source.random_model",),
}
watched = []


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What `eval` changes of a suite before it runs it."""

    batch_rows: int = 1


class Reached(BaseException):
    """The work begins: everything that was asked for is known."""


def described(value):
    """`value` without functions and addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, list | tuple):
        return [described(item) for item in value if not callable(item)]
    return str(value)


@pytest.fixture
def observed(monkeypatch, tmp_path, capfd):
    """What the program does with a command line: the calls that reach the work, or its error."""
    calls = []
    watched.clear()

    def watch(place, returns=None, last=False):
        def record(*args, **kwargs):
            calls.append((place, described(args), described(kwargs)))
            shown = progress in kwargs.values() or any(
                thread.name == progress_of.THREAD for thread in threading.enumerate()
            )
            watched.append((place, shown))
            if last:
                raise Reached
            return returns(*args) if callable(returns) else returns

        monkeypatch.setattr(f"kvcompress.{place}", record)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    files(tmp_path)
    shape = SimpleNamespace(max_position=1024)
    watch("demo.run.run", last=True)
    watch("profile.source.load_model", "model")
    watch("profile.source.random_model", lambda *_: SimpleNamespace(to=lambda device: device))
    watch("runtime.check.probe.probe", last=True)
    watch("profile.source.load_source", ("model", "tokenizer"))
    watch("profile.run.run_and_plan", last=True)
    watch("profile.store.Profile.load", profile_of)
    watch("atomic.write_file", last=True)
    watch("profile.engines.closest")
    watch("plan.Plan.load", "a plan")
    watch("bundle.write.export", last=True)
    watch("bundle.inspect.inspect", last=True)
    watch("bundle.load.serve", "model")
    watch("bundle.verify.verify", VerifyReport("b", "0" * 64, 13, None, 0.0, 0.0, 0.0, 0.0))
    watch("bundle.manifest.is_bundle", False)
    watch("evaluate.compare.plan_row", SimpleNamespace(plan="plan", params="params"))
    watch("evaluate.serving.model_shape", shape)
    watch("evaluate.suite.make_suite", Drawn())
    watch("evaluate.compare.compare", last=True)
    watch("evaluate.workloads.make_workloads", ["suite"])
    watch("evaluate.workloads_table.compare_workloads", last=True)
    watch("evaluate.harness.run_harness", last=True)
    watch("bundle.load.load", ("model", "tokenizer"))
    watch("runtime.complete.complete", last=True)
    watch("runtime.conversation.Conversation", last=True)
    watch("league.run.machine_words", lambda device: f"a machine with {device}")
    watch("league.run.run_league", "a league")
    watch("league.result.League.load", "a league")
    watch("cli.league._show", last=True)
    watch("runtime.check.doctor.diagnose", last=True)
    watch("plan.uniform", SimpleNamespace(target="a plan"))
    watch("measure.machine.keep_freed_memory", True)
    watch("bench.run.bench", last=True)

    def observe(*arguments):
        calls.clear()
        with pytest.raises((SystemExit, Reached)) as end:
            app.main([str(argument) for argument in arguments])
        error = capfd.readouterr().err
        return list(calls), error if end.type is SystemExit and end.value.code else ""

    return observe


def files(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("recipes", "recipes2"):
        (folder / name).mkdir()
        (folder / name / "mine.yaml").write_text(f"name: {name}\n{RECIPE}")


def profile_of(name):
    head = PROFILE.candidates[5]
    policies = {
        "bytes": BytesPolicy(kind="bytes", keep_ratio=0.25),
        "uniform": UniformPolicy(kind="uniform", head=head),
    }
    recipe = Recipe(policy=policies.get(str(name), policies["bytes"]))
    return PROFILE.model_copy(update={"recipe": recipe})


def parameters(command):
    click = typer.main.get_command(app.build()).commands[command]
    return {p.name: p for p in click.params if p.name not in ("json_", "help")}


def test_the_walk_covers_every_command_and_every_option():
    assert set(MODES) == set(app.COMMANDS)
    options = {
        name
        for command in MODES
        for name, parameter in parameters(command).items()
        if parameter.param_type_name == "option"
    }
    assert options == set(VALUES)


@pytest.mark.parametrize(
    ("command", "mode"), [(command, mode) for command, modes in MODES.items() for mode in modes]
)
def test_every_option_changes_what_is_done_or_is_refused(observed, command, mode):
    base = [command, *mode.split()]
    plain, error = observed(*base)
    assert plain and error == "", error
    ignored = []
    for name, parameter in parameters(command).items():
        if parameter.param_type_name != "option":
            continue
        written = parameter.opts[-1]
        more = [written] if VALUES[name] is None else [written, VALUES[name]]
        calls, error = observed(*without(base, parameter), *more)
        refused = error.startswith("error: ") and error.count("\n") == 1
        given = not set(parameter.opts).isdisjoint(base) and VALUES[name] in (None, *base)
        if calls == plain and not refused and not given:
            ignored.append(written)
    assert ignored == []


def test_everything_that_takes_long_shows_how_far_it_is(observed):
    for command, modes in MODES.items():
        for mode in modes:
            observed(command, *mode.split())
    reached = {place for place, _ in watched}
    assert reached >= LONG
    assert {place for place, shown in watched if place in LONG and not shown} == set()


def without(base, parameter):
    """`base` with the option taken out, which the caller gives another value."""
    for place, word in enumerate(base):
        if word in parameter.opts:
            return base[:place] + base[place + (1 if parameter.is_flag else 2) :]
    return base
