"""A whole league on a tiny model: cells, resuming, failures, and the program."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcompress.cli import app
from kvcompress.league import crew, work
from kvcompress.league.cells import Measured, cell_key, cell_store, code_hash, suite_hash
from kvcompress.league.crew import Crew
from kvcompress.league.entries import make_entries, read_recipes
from kvcompress.league.result import League, LeagueError
from kvcompress.league.run import Hall, failures, run_league
from kvcompress.league.work import FactsTask, Setup, shared_windows
from tests.league.conftest import no_bar, outcome


def hall(setup: Setup, recipes: Path) -> Hall:
    entries, skipped = make_entries(read_recipes(recipes))
    return Hall(setup, entries, skipped, (0.5,), "int8", "a machine")


@pytest.fixture
def count_runs(monkeypatch):
    """The plans that are really measured, None for the reference."""
    from kvcompress.evaluate import workloads_run

    runs: list[str | None] = []
    real = workloads_run.run_workload

    def counted(model, tokenizer, suite, plan=None, *rest, **named):
        runs.append(None if plan is None else plan.target)
        return real(model, tokenizer, suite, plan, *rest, **named)

    monkeypatch.setattr(workloads_run, "run_workload", counted)
    return runs


def test_a_league_runs_goes_on_and_is_not_run_twice(setup, recipes, count_runs, monkeypatch):
    told: list[League] = []
    first = hall(setup, recipes)
    first.save = told.append
    real, calls = work.Worker.measure, []

    def stops_at_the_second(self, task):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(work.Worker, "measure", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_league(first, 1, bar=no_bar)
    assert [len(league.cells) for league in told] == [1]  # the reference was told at once
    assert count_runs == [None]

    monkeypatch.setattr(work.Worker, "measure", real)
    looked_at = run_league(hall(replace(setup, finished=True), recipes), 1, bar=no_bar)
    assert [c.entry for c in looked_at.cells] == ["full cache"] and count_runs == [None]
    league = run_league(hall(setup, recipes), 1, bar=no_bar)
    assert count_runs == [None, "sink-recent at 0.5 of the bf16 KV bytes", *count_runs[2:]]
    assert len(count_runs) == 3
    assert [(c.entry, c.point) for c in league.cells] == [
        ("full cache", None),
        ("sink-recent", 0.5),
        ("h2o", 0.5),
    ]
    assert failures(league) == []
    for cell in league.cells[1:]:
        assert cell.outcome is not None and cell.outcome.kv_bytes == cell.predicted_bytes
        assert cell.outcome.kv_ratio == pytest.approx(0.5, rel=0.03)
        assert len(cell.outcome.hits) == 2
    assert run_league(hall(setup, recipes), 1, bar=no_bar).cells == league.cells
    assert len(count_runs) == 3
    assert league.conditions.lengths == {"hidden": 150}
    assert league.conditions.shared_windows == 0


def test_a_cell_that_fails_is_told_and_the_others_go_on(setup, recipes, monkeypatch):
    real = work.Worker._run

    def fails(self, suite, plan, quantized):
        if plan is not None and plan.target.startswith("sink-recent"):
            raise RuntimeError("boom\nand more")
        return real(self, suite, plan, quantized)

    monkeypatch.setattr(work.Worker, "_run", fails)
    league = run_league(hall(setup, recipes), 1, bar=no_bar)
    (wrong,) = failures(league)
    assert (wrong.entry, wrong.error) == ("sink-recent", "RuntimeError: boom and more")
    assert [c.outcome is None for c in league.cells] == [False, True, False]


def test_what_no_plan_reaches_is_no_failure(setup, recipes):
    few = replace(hall(setup, recipes), points=(0.01,))
    league = run_league(few, 1, bar=no_bar)
    assert [c.unreachable for c in league.cells] == [False, True, True]
    assert "without any budget" in league.cells[1].error and failures(league) == []


def test_cells_depend_on_plan_text_model_and_code(tmp_path, monkeypatch):
    keys = [cell_key("plan", "p", "s", "w"), cell_key("other", "p", "s", "w")]
    keys += [
        cell_key("plan", *rest) for rest in (("q", "s", "w"), ("p", "t", "w"), ("p", "s", "v"))
    ]
    assert len(set(keys)) == 5
    assert cell_key(None, "p", "s", "w") == cell_key(None, "q", "s", "w")  # no plan, no constants
    store = cell_store(tmp_path)
    store.keep("k", Measured(key="k", code="another", seconds=1.0, outcome=outcome([1.0], 0.5)))
    assert store.find("k") is None and store.find("missing") is None
    kept = cell_store(tmp_path, any_code=True).find("k")
    assert kept is not None and kept.outcome.hits == (1.0,)
    store.keep("k", kept.model_copy(update={"code": code_hash()}))
    assert store.find("k") is not None
    (tmp_path / "k.json").write_text("{", encoding="utf-8")
    assert store.find("k") is None


def test_a_suite_is_hashed_with_its_text_and_windows(setup):
    worker = work.Worker(setup)
    suite, name = worker.suite("hidden")
    assert suite_hash(suite) == name
    assert suite.windows is not None
    other = suite.windows.clone()
    other[1, 3] += 1
    assert suite_hash(replace(suite, windows=other)) != name
    assert suite_hash(replace(suite, documents=suite.documents * 2)) != name
    shown = list(suite.documents[0].prompt)
    assert shared_windows([shown[10:42]], [suite]) == 1
    assert shared_windows([shown[10:41]], [suite]) == 0


@pytest.mark.slow
def test_two_processes_and_one_agree(setup):
    with Crew(setup, 2) as two:
        (apart,) = list(two.run([FactsTask(())]))
    with Crew(setup, 1) as one:
        (here,) = list(one.run([FactsTask(())]))
    assert apart == here and here.error == ""
    assert crew._WORKER == []


# ---- the program
def program(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        app.main(["league", *map(str, arguments)])
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_league_is_shown_again_without_a_model(league, tmp_path, capfd, monkeypatch):
    data = tmp_path / "league.json"
    league.save(data)
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = program(capfd, "--render", data)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["entry", "1/8", "1/16", "its", "own", "bytes"] in lines
    (ours,) = [line for line in lines if line[:2] == ["ours", "*95.0*"]]
    assert "20.0 b" in " ".join(ours)
    words = " ".join(out.split())
    assert "D1 hidden: question unknown" in words and "*: on the Pareto front" in words
    code, out, _ = program(capfd, "--render", data, "--json")
    assert code == 0 and json.loads(out)["verdicts"]["points"][0]["planned"] == "ours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: give a model directory, or --render with a league.json"),
        (["m", "--storage", "int2"], "--storage int2: choose one of int8, int4, recipe"),
        (["m", "--workloads", "hiden"], "--workloads hiden: choose from hidden, second_turn"),
        (["m", "--points", "1/8,2"], "--points 1/8,2: give shares above 0 and up to 1, like 1/2"),
        (["m", "--points", "1/0"], "--points 1/0: give shares above 0"),
        (["m", "--recipes", "nowhere"], "nowhere: no *.yaml in it; give a folder of recipes"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capfd):
    code, out, err = program(capfd, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err


def test_a_missing_model_is_one_line(tmp_path, recipes, capfd):
    code, _, err = program(capfd, tmp_path / "none", "--recipes", recipes, "-o", tmp_path / "o")
    assert code == 2 and "no such directory; give a model directory" in err


def test_a_broken_process_says_what_to_do(setup, monkeypatch):
    class Gone:
        def submit(self, *arguments):
            from concurrent.futures import Future
            from concurrent.futures.process import BrokenProcessPool

            future: Future[object] = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future

        def shutdown(self, **named):
            pass

    broken = Crew(setup, 2)
    broken._pool = Gone()  # type: ignore[assignment]
    with pytest.raises(LeagueError, match="run the same command again with fewer --jobs"):
        list(broken.run([FactsTask(())]))


WAITING = """
import multiprocessing, threading, time
from kvcompress.league.crew import _end_with_parent

def wait():
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("here", flush=True)
    time.sleep(900)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=wait).start()
    time.sleep(900)
"""


def test_a_killed_league_leaves_no_process_behind(tmp_path):
    """The pipe that both hold ends when the last of them does."""
    (tmp_path / "waiting.py").write_text(WAITING, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "waiting.py")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "here\n"
        parent.kill()
        assert parent.communicate(timeout=300)[0] == ""


def test_cells_of_another_dtype_to_compute_in_are_others(
    setup, count_runs, tiny_llama, tiny_tokenizer, tmp_path
):
    """Of one folder: whoever goes on elsewhere, or says --dtype, mixes no two."""
    tiny_llama = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    tiny_llama.save_pretrained(tmp_path / "in16")
    tiny_tokenizer.save_pretrained(tmp_path / "in16")
    found = {}
    for dtype in ("stored", "float32", "stored", "float32", "bfloat16"):
        worker = work.Worker(replace(setup, model=str(tmp_path / "in16"), dtype=dtype))
        found.setdefault(dtype, worker.measure(work.CellTask("hidden")).key)
        assert worker.weights == found.setdefault("weights", worker.weights)
    assert len(count_runs) == 2
    assert found["stored"] == found["bfloat16"] != found["float32"]


STOPPED = """
import os, signal, sys, threading, time
from kvcompress.league import crew

class Worker:
    def __init__(self, setup):
        pass

    def do(self, task):
        time.sleep(900)

crew.Worker = Worker  # in the spawned processes too, which import this file

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with crew.Crew(None, 2) as two:
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
        list(two.run(["a", "b", "c"]))
"""


def test_a_stopped_league_waits_for_no_cell(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "stopped.py")],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert "KeyboardInterrupt" in done.stderr
