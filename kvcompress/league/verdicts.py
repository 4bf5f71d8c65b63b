"""What follows from the cells: pure functions from a league to verdicts.

Scores are shares of questions answered word for word. Two entries at one point hold equal bytes, up
to `tune.TOLERANCE`; every difference is paired per sample, with a 95 % bootstrap interval. The best
of several rivals is the one with the highest mean on the very samples that are compared, which
favours the rival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal

from kvcompress.evaluate.workloads_table import ranks
from kvcompress.league.entries import Role
from kvcompress.league.result import Cell, League
from kvcompress.league.tune import TOLERANCE
from kvcompress.measure.stats import Interval, interval, paired
from kvcompress.plan import StrictModel

# beats: above the best trivial baseline, zero outside of the interval of the difference.
# unclear: above it, but the interval holds zero. baseline: not above it.
Label = Literal["beats", "unclear", "baseline"]
# front: no other entry scores higher in at most its bytes, or as high in clearly fewer.
# tied: none scores higher, but one scores as high in clearly fewer bytes. dominated: one is higher.
Place = Literal["front", "tied", "dominated"]
RETAINED: float = 0.97


class Versus(StrictModel):
    """An entry against one rival on the same samples; positive is better.

    Attributes:
        rival_point: the rival's byte target, None where it is at its own bytes.
    """

    rival: str
    rival_point: float | None
    rival_score: float
    difference: float
    interval: Interval

    @property
    def clear(self) -> bool:
        """Whether zero lies outside of the interval, on either side."""
        return self.interval[0] > 0 or self.interval[1] < 0


class Standing(StrictModel):
    """One entry at one point on one workload.

    Attributes:
        share: measured bytes as a share of the 16-bit cache's.
        retained: score as a share of the full cache's; None where that answers nothing.
        label: against the best trivial baseline; None for one of these, and without one.
        place: on the Pareto front of all entries.
        above: what beats it there, or ties with it in fewer bytes; None on the front.
        in_budget: measured bytes are within `TOLERANCE` of the target or below it.
    """

    entry: str
    role: Role
    score: float
    interval: Interval
    kv_bytes: int
    share: float
    retained: float | None
    label: Label | None
    versus_baseline: Versus | None
    place: Place
    above: Versus | None = None
    in_budget: bool = True


class PointVerdict(StrictModel):
    """One workload at one byte target.

    Attributes:
        reference: score of the full cache.
        ranked: that is high enough for the others to mean something, see `ranks`.
        baseline: best trivial baseline, empty if none ran.
        planned: the best planned entry, empty if none ran; the next ones are about it.
        on_front: it is `front` or `tied`.
        versus_published: against the best published method, codes of all tokens that fit included.
        versus_quantization: against the best entry that keeps every token and fits; None if none.
        versus_parts: against the better of the planner's two parts; None if none ran.
        kl_nats, kl_parts: smallest mean KL of a planned entry and of a part; None where the
            workload does not measure it.
    """

    workload: str
    point: float
    reference: float | None
    ranked: bool = True
    baseline: str
    standings: tuple[Standing, ...]
    planned: str = ""
    on_front: bool = False
    retained: float | None = None
    versus_published: Versus | None = None
    versus_quantization: Versus | None = None
    versus_parts: Versus | None = None
    kl_nats: float | None = None
    kl_parts: float | None = None


class Verdicts(StrictModel):
    """Everything; `points` in the order of workloads, then of byte targets."""

    points: tuple[PointVerdict, ...]


def judge(league: League) -> Verdicts:
    """All verdicts of a league, of what has been measured so far."""
    roles = {row.name: row.role for row in league.rows}
    found = []
    for workload in league.workloads:
        cells = [c for c in league.cells if c.workload == workload and c.outcome is not None]
        for point in league.points:
            found.append(judge_point(cells, roles, workload, point, league.conditions.seed))
    return Verdicts(points=tuple(found))


def judge_point(
    cells: Sequence[Cell], roles: dict[str, Role], workload: str, point: float, seed: int = 0
) -> PointVerdict:
    """See `PointVerdict`.

    Args:
        cells: all measured cells of the workload; those of other points matter for the front.
    """
    # a recall tier holds most of its bytes in host memory: equal bytes would not be equal
    cells = [c for c in cells if roles[c.entry] not in ("recall", "own")]
    reference = next((c for c in cells if roles[c.entry] == "reference"), None)
    here = [c for c in cells if c.point == point]
    fixed = [c for c in cells if roles[c.entry] == "quantization" and fits(c, point)]
    taking_part = [*here, *fixed]
    baseline = best(c for c in here if roles[c.entry] == "baseline")
    standings = [
        _standing(cell, cells, roles, point, reference, baseline, seed) for cell in taking_part
    ]
    planned = best(c for c in here if roles[c.entry] == "planned")
    verdict = PointVerdict(
        workload=workload,
        point=point,
        reference=None if reference is None else score(reference),
        ranked=ranks(workload, None if reference is None else score(reference)),
        baseline="" if baseline is None else baseline.entry,
        standings=tuple(sorted(standings, key=lambda s: -s.score)),
    )
    if planned is None:
        return verdict
    own = next(s for s in standings if s.entry == planned.entry)
    published = best([*(c for c in here if roles[c.entry] == "published"), *fixed])
    parts = best(c for c in here if roles[c.entry] == "part")

    def against(rival: Cell | None) -> Versus | None:
        return None if rival is None else versus(planned, rival, seed)

    return verdict.model_copy(
        update={
            "planned": planned.entry,
            "on_front": own.place != "dominated",
            "retained": own.retained,
            "versus_published": against(published),
            "versus_quantization": against(best(fixed)),
            "versus_parts": against(parts),
            "kl_nats": _least_kl(c for c in here if roles[c.entry] == "planned"),
            "kl_parts": _least_kl(c for c in here if roles[c.entry] == "part"),
        }
    )


def score(cell: Cell) -> float:
    assert cell.outcome is not None
    return cell.outcome.score


def share(cell: Cell) -> float:
    """Measured bytes as a share of the 16-bit cache's."""
    assert cell.outcome is not None
    return cell.outcome.kv_ratio


def fits(cell: Cell, point: float) -> bool:
    """Whether the measured bytes are at most those of `point`, to the tolerance."""
    return share(cell) <= point * (1 + TOLERANCE)


def best(cells: Iterable[Cell]) -> Cell | None:
    """The cell with the highest score, of those the one with the fewest bytes; None of none."""
    return max(cells, key=lambda cell: (score(cell), -share(cell)), default=None)


def _least_kl(cells: Iterable[Cell]) -> float | None:
    known = (c.outcome.kl_nats for c in cells if c.outcome is not None)
    return min((fmean(nats) for nats in known if nats is not None), default=None)


def versus(cell: Cell, rival: Cell, seed: int = 0) -> Versus:
    assert cell.outcome is not None and rival.outcome is not None
    difference, bounds = paired(cell.outcome.hits, rival.outcome.hits, seed)
    return Versus(
        rival=rival.entry,
        rival_point=rival.point,
        rival_score=score(rival),
        difference=difference,
        interval=bounds,
    )


def label_of(against: Versus) -> Label:
    if against.difference <= 0:
        return "baseline"
    return "beats" if against.interval[0] > 0 else "unclear"


def place_of(cell: Cell, others: Iterable[Cell]) -> tuple[Place, Cell | None]:
    """Where `cell` lies in (bytes, score), and the best of what is above it or ties with it.

    Bytes within `TOLERANCE` of each other count as equal.
    """
    rivals = list(others)
    higher = [o for o in rivals if share(o) <= share(cell) * (1 + TOLERANCE)]
    top = best(higher)
    if top is not None and score(top) > score(cell):
        return "dominated", top
    smaller = [o for o in rivals if share(o) < share(cell) * (1 - TOLERANCE)]
    small = best(smaller)
    if small is not None and score(small) >= score(cell):
        return "tied", small
    return "front", None


def _standing(
    cell: Cell,
    cells: Sequence[Cell],
    roles: dict[str, Role],
    point: float,
    reference: Cell | None,
    baseline: Cell | None,
    seed: int,
) -> Standing:
    assert cell.outcome is not None
    mean, bounds = interval(cell.outcome.hits, seed)
    role = roles[cell.entry]
    full = 0.0 if reference is None else score(reference)
    against = None
    if baseline is not None and role != "baseline":
        against = versus(cell, baseline, seed)
    # ours at other sizes, and its parts, are no rivals of a planned entry
    own = {"planned", "part"} if role == "planned" else set()
    rivals = (c for c in cells if c.entry != cell.entry and roles[c.entry] not in own)
    place, above = place_of(cell, rivals)
    return Standing(
        entry=cell.entry,
        role=role,
        score=mean,
        interval=bounds,
        kv_bytes=cell.outcome.kv_bytes,
        share=share(cell),
        retained=mean / full if full > 0 else None,
        label=None if against is None else label_of(against),
        versus_baseline=against,
        place=place,
        above=None if above is None else versus(cell, above, seed),
        in_budget=fits(cell, point),
    )
