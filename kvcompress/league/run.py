"""The league from beginning to end: profiles, then role by role plans and cells."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final

from kvcompress.league.cells import code_hash, versions
from kvcompress.league.crew import Crew, Done
from kvcompress.league.entries import Entry, Skipped, Storage
from kvcompress.league.profiles import constants_recipe, measured_recipe, within
from kvcompress.league.result import Cell, Conditions, League, LeagueError, Row
from kvcompress.league.tune import OWN_BYTES, Placed, sized_recipe
from kvcompress.league.work import (
    WINDOW_TOKENS,
    CellTask,
    Facts,
    FactsTask,
    PlaceTask,
    ProfileTask,
    Setup,
)
from kvcompress.measure import machine
from kvcompress.profile.solve import reads_profile
from kvcompress.profile.store import Profile

LEAGUE_FILE: Final = "league.json"
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class Hall:
    """What a running league has so far.

    Attributes:
        save: told the league after each role, so that there is something to read early.
    """

    setup: Setup
    entries: Sequence[Entry]
    skipped: Sequence[Skipped]
    points: tuple[float, ...]
    storage: Storage
    machine: str
    save: Callable[[League], None] = lambda league: None
    cells: list[Cell] = field(default_factory=list)
    placed: dict[tuple[str, float, int], Done] = field(default_factory=dict)
    other_code: int = 0

    def league(self, facts: Facts) -> League:
        setup = self.setup
        order = {entry.name: place for place, entry in enumerate(self.entries)}
        cells = sorted(
            self.cells,
            key=lambda cell: (
                order[cell.entry],
                -(cell.point or 2.0),
                setup.workloads.index(cell.workload),
            ),
        )
        limit = facts.shape.max_position
        recipes = [within(e.recipe, limit) for e in self.entries if e.recipe is not None]
        calibrations = [recipe.calibration for recipe in recipes]
        data = sorted({f"{c.data}, {c.prompts} prompts of {c.tokens} tokens" for c in calibrations})
        return League(
            conditions=Conditions(
                date=machine.today(),
                model=_model_name(setup.model),
                weights_hash=facts.weights_hash,
                machine=self.machine,
                device=facts.device,
                dtype=facts.dtype,
                versions=versions(),
                context_tokens=setup.context_tokens,
                samples=setup.samples,
                seed=setup.seed,
                storage=self.storage,
                lengths=facts.lengths,
                calibration="; ".join(data) or "none",
                window_tokens=WINDOW_TOKENS,
                shared_windows=facts.shared_windows,
                other_code=self.other_code,
                seconds=round(sum(cell.seconds for cell in cells), 1),
            ),
            points=self.points,
            workloads=setup.workloads,
            rows=tuple(
                Row(name=e.name, role=e.role, description=e.description, same_as=e.same_as)
                for e in self.entries
            ),
            cells=tuple(cells),
            skipped=tuple(self.skipped),
        )


def run_league(
    hall: Hall,
    jobs: int,
    *,
    note: Callable[[str], None] = lambda text: None,
    bar: Bar,
) -> League:
    """Every entry of `hall` at every point on every workload.

    What fails is a cell with an error; the others go on. Stopped at any moment, the same call goes
    on, because cells, measured plans and profiles lie under ``setup.out``.

    Raises:
        LeagueError: if the model's process cannot be started or a profile cannot be taken.
        KVCompressError: if the model or the recipes cannot be used.
    """
    hall.setup.out.mkdir(parents=True, exist_ok=True)
    recipes = tuple(e.recipe for e in hall.entries if e.recipe is not None)
    quantized = tuple(e.quantized for e in hall.entries if e.quantized is not None)
    with Crew(hall.setup, jobs) as crew:
        with bar("loading the model and drawing samples", 1):
            facts: Facts = _only(crew.run([FactsTask(recipes, quantized)]))
        _leave_out(hall, facts)
        wanted = _profiles(hall, facts)
        _check_given(hall.setup, wanted, facts)
        note(f"{len(wanted)} profiles, then {_count(hall)} cells")
        with bar("profiles", len(wanted)) as finished:
            # the first serves every plan: it must be there before two processes look for it
            for count, done in enumerate(_chain(crew, wanted), start=1):
                if done.error:
                    raise LeagueError(f"profile: {done.error}")
                finished(count)
        with bar("cells", _count(hall)) as finished:
            for workloads in _passes(hall, facts):
                for role, group in groupby(hall.entries, key=lambda entry: entry.role):
                    before = len(hall.cells)
                    _tier(hall, crew, list(group), workloads, facts, finished)
                    hall.save(hall.league(facts))
                    new = hall.cells[before:]
                    failed = sum(bool(cell.error and not cell.unreachable) for cell in new)
                    note(f"{', '.join(workloads)}: {role}: {len(new)} cells, {failed} failed")
    return hall.league(facts)


def _check_given(setup: Setup, wanted: Sequence[ProfileTask], facts: Facts) -> None:
    """Refuse a finished profile that no plan of this league would be solved from."""
    if setup.given is None:
        return
    given = measured_recipe(Profile.load(setup.given).recipe)
    limit = facts.shape.max_position
    if all(given != within(measured_recipe(task.recipe), limit) for task in wanted):
        raise LeagueError(
            f"{setup.given}: was measured with other settings than any entry of this league; leave "
            "--profile out"
        )


def failures(league: League) -> list[Cell]:
    """Cells that went wrong, those aside that no plan can reach."""
    return [cell for cell in league.cells if cell.error and not cell.unreachable]


def _leave_out(hall: Hall, facts: Facts) -> None:
    """Entries that cannot run here are told among what did not run."""
    reasons = {e.name: facts.refusals[e.quantized] for e in hall.entries if e.quantized is not None}
    hall.skipped = [*hall.skipped, *(Skipped(name=n, reason=r) for n, r in reasons.items() if r)]
    hall.entries = [entry for entry in hall.entries if not reasons.get(entry.name)]


def _passes(hall: Hall, facts: Facts) -> list[list[str]]:
    """Workloads that run together; what decodes token by token takes longest and comes last."""
    quick = [name for name in hall.setup.workloads if name not in facts.decoded]
    slow = [name for name in hall.setup.workloads if name in facts.decoded]
    return [names for names in (quick, slow) if names]


def _tier(
    hall: Hall,
    crew: Crew,
    entries: Sequence[Entry],
    workloads: Sequence[str],
    facts: Facts,
    finished: Callable[[int], None],
) -> None:
    """All cells of entries of one role."""
    tasks: list[tuple[Entry, float | None, CellTask]] = [
        (entry, None, CellTask(name, quantized=entry.quantized))
        for entry in entries
        if entry.recipe is None
        for name in workloads
    ]
    for task, done in _placed(hall, crew, entries, sorted({facts.lengths[w] for w in workloads})):
        at = [name for name in workloads if facts.lengths[name] == task.length_tokens]
        if done.error:
            hall.cells += [_failed(task.entry, task.point, name, done) for name in at]
            finished(len(hall.cells))
            continue
        placed: Placed = done.value
        tasks += [(task.entry, placed.point, CellTask(name, placed)) for name in at]
    tasks.sort(key=lambda each: entries.index(each[0]))
    for done in crew.run([task for _, _, task in tasks]):
        entry, point, cell_task = tasks[done.number]
        if hall.setup.finished and done.value is None and not done.error:
            continue
        hall.cells.append(_cell(hall, entry, point, cell_task, done))
        finished(len(hall.cells))


def _placed(
    hall: Hall, crew: Crew, entries: Sequence[Entry], lengths: Sequence[int]
) -> list[tuple[PlaceTask, Done]]:
    """The plans of entries of one role at every point, each found once."""
    wanted = [
        PlaceTask(entry, point, length)
        for entry in entries
        if entry.recipe is not None
        for point in (hall.points[:1] if entry.role in OWN_BYTES else hall.points)
        for length in lengths
    ]
    new = [task for task in wanted if _place_of(task) not in hall.placed]
    for done in crew.run(new):
        hall.placed[_place_of(new[done.number])] = done
    return [(task, hall.placed[_place_of(task)]) for task in wanted]


def _place_of(task: PlaceTask) -> tuple[str, float, int]:
    return task.entry.name, task.point, task.length_tokens


def _cell(hall: Hall, entry: Entry, point: float | None, task: CellTask, done: Done) -> Cell:
    if done.error:
        return _failed(entry, point, task.workload, Done(0, error=done.error))
    hall.other_code += done.value.code != code_hash()
    return Cell(
        entry=entry.name,
        workload=task.workload,
        point=point,
        predicted_bytes=None if task.placed is None else task.placed.kv_bytes,
        predicted_nats=None if task.placed is None else task.placed.plan.predicted_loss,
        short="" if task.placed is None else task.placed.short,
        outcome=done.value.outcome,
        seconds=done.value.seconds,
    )


def _failed(entry: Entry, point: float | None, workload: str, done: Done) -> Cell:
    return Cell(
        entry=entry.name,
        workload=workload,
        point=point,
        error=done.error,
        unreachable=done.refused,
    )


def _count(hall: Hall) -> int:
    once = sum(entry.role in ("reference", *OWN_BYTES) for entry in hall.entries)
    rows = once + (len(hall.entries) - once) * len(hall.points)
    return rows * len(hall.setup.workloads)


def _profiles(hall: Hall, facts: Facts) -> list[ProfileTask]:
    """One task for each profile that some plan is solved from; the one of the constants first."""
    calibration = hall.setup.calibration
    recipes = [constants_recipe("lift", calibration)]
    for entry in hall.entries:
        if entry.recipe is not None:
            recipes.append(constants_recipe(entry.recipe.keep.scorer, calibration))
        if entry.recipe is None or not reads_profile(entry.recipe.policy):
            continue
        recipes += [
            measured_recipe(sized_recipe(facts.shape, entry.recipe, point, length))
            for point in hall.points
            for length in sorted(set(facts.lengths.values()))
        ]
    unique = {measured_recipe(recipe).to_yaml(): recipe for recipe in recipes}
    return [ProfileTask(recipe) for recipe in unique.values()]


def _chain(crew: Crew, tasks: Sequence[ProfileTask]) -> Iterator[Done]:
    yield from crew.run(tasks[:1])
    yield from crew.run(tasks[1:])


def _only(results: Iterator[Done]) -> Facts:
    (done,) = results
    if done.error:
        raise LeagueError(done.error)
    facts: Facts = done.value
    return facts


def _model_name(model: str) -> str:
    """The name on the hub, or a path that says nothing of the machine."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() else model


def machine_words(device: str) -> str:
    """What the league runs on, in words."""
    words = f"{machine.cores()} cores of a {platform.machine()} CPU, one thread per process"
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            words = f"{torch.cuda.get_device_name()}, {words}"
    return words
