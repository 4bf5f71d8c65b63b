"""`kvcompress league`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    console,
    emit,
    refuse_unread,
)
from kvcompress.cli.progress import progress

if TYPE_CHECKING:
    from kvcompress.league.result import League

POINTS = "1/2,1/4,1/8,1/16,1/40"


_WITH_RENDER = {"render", "json_"}


def command(
    arguments: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub name of a causal model.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Directory for results and everything kept.")
    ] = Path("runs/league"),
    recipes: Annotated[Path, typer.Option(help="Folder of recipes.")] = Path("recipes"),
    points: Annotated[
        str, typer.Option(help="Shares of the bf16 KV bytes, with commas between.")
    ] = POINTS,
    workloads: Annotated[
        str,
        typer.Option(help="Names with commas between; by default those of the shipped model."),
    ] = "",
    only: Annotated[
        str, typer.Option(help="Names or roles of entries; the reference is always there.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Scored samples per workload.")] = 24,
    context: Annotated[int, typer.Option(min=64, help="Tokens of each document.")] = 960,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    storage: Annotated[
        str,
        typer.Option(help="int8 or int4 in place of an evictor's 16 bits, or recipe to leave it."),
    ] = "int8",
    profile: Annotated[
        Path | None, typer.Option(help="Finished profile, used where its settings fit.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with a model.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    machine: Annotated[str, typer.Option(help="The machine in words, for the file.")] = "",
    any_code: Annotated[
        bool, typer.Option(help="Keep cells that other code of this package measured.")
    ] = False,
    finished: Annotated[
        bool, typer.Option(help="Write what is measured so far, and measure nothing.")
    ] = False,
    render: Annotated[
        Path | None, typer.Option(help="Only show the tables of this league.json again.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure every recipe at equal bytes on every workload, and say who wins.

    Stopped with Ctrl-C, the same command goes on where it was. Examples:

        kvcompress league kvcompress/demo/model -o runs/league --jobs 2

        kvcompress league --render runs/league/league.json

    A page with pictures is made of the file by benchmarks/league_page.py in the repository.
    """
    from kvcompress.league.result import LeagueError
    from kvcompress.league.run import LEAGUE_FILE, Hall, failures, machine_words, run_league
    from kvcompress.league.work import Setup

    if render is not None:
        others = {p.name or "" for p in arguments.command.params} - _WITH_RENDER
        refuse_unread(arguments, "with --render", *sorted(others))
        from kvcompress.league.result import League as Data

        _show(Data.load(render), json_)
        return
    if model is None:
        raise LeagueError("no model: give a model directory, or --render with a league.json")
    from kvcompress.league.entries import (
        STORAGES,
        choose,
        make_entries,
        quantized_entries,
        read_recipes,
    )

    stored = next((each for each in STORAGES if each == storage), None)
    if stored is None:
        raise LeagueError(f"--storage {storage}: choose one of {', '.join(STORAGES)}")
    entries, skipped = make_entries(read_recipes(recipes), stored, quantized_entries())
    setup = Setup(
        model=model,
        device=device,
        out=out,
        workloads=_workloads(workloads),
        samples=samples,
        context_tokens=context,
        seed=seed,
        given=profile,
        any_code=any_code,
        finished=finished,
        dtype=dtype,
    )
    hall = Hall(
        setup,
        choose(entries, _words(only)),
        skipped,
        _points(points),
        stored,
        machine or machine_words(device),
        save=lambda league: league.save(out / LEAGUE_FILE),
    )
    screen = console()
    league = run_league(hall, jobs, note=screen.print, bar=progress)
    _show(league, json_, out / LEAGUE_FILE)
    wrong = failures(league)
    for cell in wrong:
        screen.print(f"failed: {cell.entry} at {cell.point} on {cell.workload}: {cell.error}")
    if wrong:
        raise typer.Exit(1)


def _show(league: League, json_: bool, data: Path | None = None) -> None:
    """The verdicts and the league, or a table for each workload; both in `data`, if it is given."""
    from kvcompress.evaluate.workloads import KNOWN
    from kvcompress.league.tables import LEGEND, score_rows
    from kvcompress.league.verdicts import judge
    from kvcompress.measure.tables import terminal

    verdicts = judge(league)
    if data is not None:
        league.save(data, verdicts=verdicts.model_dump(mode="json"))
        console().print(f"league written to {data}")
    if json_:
        emit({"league": league, "verdicts": verdicts}, json_)
        return
    for name in league.workloads:
        rows = [
            {heading: text.replace("**", "*") for heading, text in row.items()}
            for row in score_rows(league, verdicts, name)
        ]
        title = f"{KNOWN[name].axis} {name}: {KNOWN[name].summary}"
        caption = LEGEND.replace("**Bold**", "*") if name == league.workloads[-1] else None
        emit(terminal(rows, title=title, caption=caption), json_)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _workloads(text: str) -> tuple[str, ...]:
    from kvcompress.evaluate.workloads import KNOWN, WORKLOADS
    from kvcompress.league.result import LeagueError

    names = _words(text) or list(WORKLOADS)
    wrong = sorted(set(names) - set(KNOWN))
    if wrong:
        known = ", ".join(KNOWN)
        raise LeagueError(f"--workloads {', '.join(wrong)}: choose from {known}")
    return tuple(name for name in KNOWN if name in names)


def _points(text: str) -> tuple[float, ...]:
    """Shares like ``1/8`` or ``0.125``, the largest first."""
    from fractions import Fraction

    from kvcompress.league.result import LeagueError

    try:
        shares = {float(Fraction(word)) for word in _words(text)}
    except (ValueError, ZeroDivisionError):
        shares = set()
    if not shares or min(shares) <= 0 or max(shares) > 1:
        raise LeagueError(f"--points {text}: give shares above 0 and up to 1, like {POINTS}")
    return tuple(sorted(shares, reverse=True))
