"""Real pretrained models: every way to hold the cache at equal bytes, by task score and by KL.

    python benchmarks/real.py --model DIR --model DIR   # results/real/*.json, docs/real-models.md
    python benchmarks/real.py --model DIR --quick       # a few minutes, into runs/real alone
    python benchmarks/real.py --page                    # the page anew from the results

Profiles are taken on the way. Stopped, the same command goes on where it was: profiles, plans and
cells lie under runs/real. On a CPU everything runs in float32, and bytes are those of 16 bits.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import reference_check
from pages.real_page import write_page

from kvcompress.cli.progress import progress
from kvcompress.league.entries import Entry, Skipped, make_entries, read_recipes
from kvcompress.league.result import League
from kvcompress.league.run import Hall, failures, machine_words, run_league
from kvcompress.league.verdicts import judge
from kvcompress.league.work import CellTask, Setup, Worker
from kvcompress.recipe import Calibration, FastGenPolicy, Keep, Recipe
from kvcompress.tasks.stdlib_text import code, prose

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results" / "real"
PAGE: Final = ROOT / "docs" / "real-models.md"
RUNS: Final = ROOT / "runs" / "real"
POINTS: Final = (1 / 4, 1 / 8, 1 / 16)
# every token in codes, the planner, a trivial baseline, and the best published methods
ENTRIES: Final = (
    *("int8", "int4", "k8v4", "planned"),
    *("sink-recent", "h2o-lift", "snapkv", "adakv", "pyramidkv"),
)
CHECKED: Final = ("symbols", "prose", "code")  # workloads that plain transformers look at again
TARGETS: Final = (0.90, 0.95, 0.99)  # FastGen's T


@dataclass(frozen=True)
class Amount:
    """How much is measured of each model."""

    workloads: tuple[str, ...]
    samples: int
    windows: int
    points: tuple[float, ...]
    entries: tuple[str, ...]
    targets: tuple[float, ...]
    calibration: Calibration


OF_CODERS: Final = ("symbols", "code")  # of models with `coder` in their name
WHOLE: Final = Amount(
    ("symbols", "prose", "facts"),
    samples=24,
    windows=4,
    points=POINTS,
    entries=ENTRIES,
    targets=TARGETS,
    calibration=Calibration(),
)
QUICK: Final = Amount(
    ("symbols", "code"),
    samples=16,
    windows=1,
    points=(1 / 8,),
    entries=("int8", "planned", "sink-recent", "h2o-lift"),
    targets=(0.95,),
    calibration=Calibration(prompts=2, tokens=256),
)


def entries_of(amount: Amount) -> tuple[list[Entry], list[Skipped]]:
    """The league's entries with the calibration of `amount`, and FastGen at its own bytes."""
    found, skipped = make_entries(read_recipes(ROOT / "recipes"), others=fastgen(amount))
    wanted = [e for e in found if e.role in ("reference", "own") or e.name in amount.entries]
    return [_calibrated(entry, amount.calibration) for entry in wanted], skipped


def fastgen(amount: Amount) -> list[Entry]:
    """FastGen's own figure: what its rule prunes at T, at whatever bytes that takes."""
    return [
        Entry(
            name=f"fastgen T={target:g}",
            role="own",
            description=f"per head the cheapest keep-set that keeps {target:g} of the attention",
            recipe=Recipe(
                name="fastgen",
                keep=Keep(score_rows=None),
                policy=FastGenPolicy(kind="fastgen", recovery=target),
            ),
        )
        for target in amount.targets
    ]


def _calibrated(entry: Entry, calibration: Calibration) -> Entry:
    if entry.recipe is None:
        return entry
    recipe = entry.recipe.model_copy(update={"calibration": calibration})
    return entry.model_copy(update={"recipe": recipe})


def measure(model: str, amount: Amount, arguments: argparse.Namespace) -> League:
    """One model, into ``runs/real/NAME`` and its results file."""
    name = Path(model).resolve().name
    entries, skipped = entries_of(amount)
    setup = Setup(
        model=model,
        device=arguments.device,
        out=RUNS / ("quick" if arguments.quick else "whole") / name,
        workloads=_workloads(name, amount, arguments),
        samples=amount.samples,
        context_tokens=arguments.context,
        seed=0,
        given=arguments.profile,
        calibration=amount.calibration,
        sizes=(("windows", amount.windows),),
        dtype="float32" if arguments.device == "cpu" else "stored",
    )
    where = setup.out if arguments.quick else RESULTS
    hall = Hall(
        setup,
        entries,
        skipped,
        amount.points,
        "int8",
        machine_words(arguments.device),
        save=lambda league: _save(league, where / f"{name}.json"),
    )
    league = run_league(
        hall, arguments.jobs, note=lambda text: print(text, flush=True), bar=progress
    )
    for cell in failures(league):
        print(f"failed: {cell.entry} at {cell.point} on {cell.workload}: {cell.error}")
    checked = [name for name in CHECKED if name in league.workloads]
    _save(league, where / f"{name}.json", plain=plainly(hall, league, *checked))
    return league


def _workloads(name: str, amount: Amount, arguments: argparse.Namespace) -> tuple[str, ...]:
    """What was asked for; a model of code is asked about code, in the time that is left."""
    if arguments.workloads:
        return tuple(arguments.workloads.split(","))
    return OF_CODERS if "coder" in name and not arguments.quick else amount.workloads


def plainly(hall: Hall, league: League, *workloads: str) -> dict[str, Any]:
    """The planned entry's figures beside those of plain transformers, by workload."""
    worker = Worker(hall.setup)
    point = league.points[len(league.points) // 2]
    found = {}
    for name in workloads:
        suite, _ = worker.suite(name)
        placed = hall.placed["planned", point, suite.context_tokens].value
        measured = worker.measure(CellTask(name, placed))
        params, _ = worker.params(placed.plan)
        folder = hall.setup.out / "plain" / name
        with progress(f"{name} by plain transformers"):
            found[name] = reference_check.check(
                hall.setup.model,
                worker.model,
                worker.tokenizer,
                suite,
                placed.plan,
                params,
                measured.outcome,
                folder,
            )
    return {"entry": "planned", "point": point, "workloads": found}


def _save(league: League, path: Path, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    verdicts = judge(league).model_dump(mode="json")
    league.save(path, texts=text_hashes(), verdicts=verdicts, **more)


def text_hashes() -> dict[str, str]:
    """sha256 of what is evaluated on, which another release of Python may word otherwise."""
    texts = {"prose": prose("evaluation"), "code": code("evaluation")}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", default=[], help="directory; several times")
    parser.add_argument("--quick", action="store_true", help="a few cells, no page")
    parser.add_argument("--page", action="store_true", help="write the page anew and stop")
    parser.add_argument("--context", type=int, default=960, help="tokens of a document")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", type=Path, help="a finished profile of the same settings")
    for name in ("workloads", "samples", "windows", "prompts", "tokens"):
        parser.add_argument(f"--{name}", help=f"in place of the usual {name}")
    arguments = parser.parse_args()
    amount = _amount(arguments)
    for model in [] if arguments.page else arguments.model:
        print(f"{Path(model).resolve().name}: profiles, plans and cells", flush=True)
        measure(model, amount, arguments)
    if not arguments.quick:
        write_page(sorted(RESULTS.glob("*.json")), PAGE)
        print(f"page written to {PAGE.relative_to(ROOT)}")


def _amount(arguments: argparse.Namespace) -> Amount:
    amount = QUICK if arguments.quick else WHOLE
    changes: dict[str, Any] = {}
    changes |= {k: int(v) for k in ("samples", "windows") if (v := getattr(arguments, k))}
    fewer = {k: int(v) for k in ("prompts", "tokens") if (v := getattr(arguments, k))}
    changes["calibration"] = amount.calibration.model_copy(update=fewer)
    return replace(amount, **changes)


if __name__ == "__main__":
    main()
