"""docs/real-models.md and its pictures, from the results of `benchmarks/real.py` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from kvcompress.atomic import write_file
from kvcompress.evaluate.workloads import KNOWN
from kvcompress.evaluate.workloads_table import RANKED_FROM
from kvcompress.league.result import Cell, League, point_name
from kvcompress.league.tables import LEGEND, TableRow, kl_rows, mean_rows, score_rows
from kvcompress.league.verdicts import Verdicts, fits, judge, share
from kvcompress.measure.cells import Record
from kvcompress.measure.stats import paired
from kvcompress.measure.tables import markdown
from pages.league_plots import draw_all
from pages.league_words import verdict_lines

_HEAD: Final = """\
# Real models

Pretrained models at equal measured bytes: the full cache, codes of every token, the planner, and
published methods. This page is made by `benchmarks/real.py`; no number on it is typed by hand, and
a verdict holds for the model that it stands under.

Text is real: prose and code that every Python carries, of which calibration sees another part.
An answer counts as right where each of its tokens is the likeliest one; nats are −log p of a token
of the true answer, which separate methods where no answer is right. Where a workload is text alone,
its score is the share of tokens whose likeliest prediction is the full cache's.
"""


def write_page(results: Sequence[Path], page: Path) -> None:
    """The page, and pictures in a folder of its name beside it.

    Raises:
        KVCompressError: where matplotlib is not installed, or a result cannot be read.
    """
    lines = [_HEAD]
    for path in results:
        league = League.load(path)
        data: Record = json.loads(path.read_text(encoding="utf-8"))
        folder = page.with_suffix("") / path.stem
        titles = {name: f"{KNOWN[name].axis} {name}" for name in league.workloads}
        draw_all(league, folder, titles)
        lines += _model(league, judge(league), data, f"{page.stem}/{path.stem}")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_file(page, "\n".join(lines).rstrip() + "\n")


def _model(league: League, verdicts: Verdicts, data: Record, pictures: str) -> list[str]:
    lines = [f"## {league.conditions.model}", ""]
    lines += [f"![Score against bytes]({pictures}/overview.png)", "", *_full(league)]
    lines += [f"### Verdicts, {league.conditions.model}", "", *verdict_lines(verdicts), LEGEND, ""]
    lines += _likelihood(league)
    for name in league.workloads:
        lines += [f"### {KNOWN[name].axis} {name}: {KNOWN[name].summary}", ""]
        lines += _table(score_rows(league, verdicts, name))
        if KNOWN[name].text:
            lines += ["KL to the full cache, nats per token:", "", *_table(kl_rows(league, name))]
        else:
            lines += ["Nats per token of the true answer:", "", *_nats(league, name)]
    return [*lines, *_fastgen(league), *_plain(data.get("plain")), *_conditions(league, data)]


def _table(rows: Sequence[TableRow]) -> list[str]:
    return [markdown(list(rows[0]), [list(row.values()) for row in rows], tight=True), ""]


def _full(league: League) -> list[str]:
    """What the full cache itself does, and so what ranks."""
    rows = []
    for cell in _of(league, "full cache"):
        done = cell.outcome
        assert done is not None and done.answer_nats is not None
        alone = KNOWN[cell.workload].draw is None
        ranks = "" if alone or done.score >= RANKED_FROM else "not ranked"
        score = "" if alone else f"{100 * done.score:.0f} %"
        nats = f"{fmean(done.answer_nats):.3f}"
        rows.append([cell.workload, str(len(done.hits)), score, nats, ranks])
    heads = ["workload", "samples or windows", "full cache right", "nats per token", ""]
    return [markdown(heads, rows, tight=True), ""]


def _nats(league: League, workload: str) -> list[str]:
    return _table(mean_rows(league, workload, lambda outcome: outcome.answer_nats))


def _likelihood(league: League) -> list[str]:
    """The planned entry against the best other one that fits, by nats of the true answers."""
    roles = {row.name: row.role for row in league.rows}
    rivals = ("published", "baseline", "quantization")
    rows = []
    for workload in league.workloads:
        cells = [c for c in league.cells if c.workload == workload and c.outcome is not None]
        for point in league.points:
            ours = next((c for c in cells if c.entry == "planned" and c.point == point), None)
            others = [c for c in cells if roles[c.entry] in rivals and fits(c, point)]
            here = [c for c in others if c.point in (point, None)]
            if ours is None or not here:
                continue
            best = min(here, key=_mean_nats)
            gap, (low, high) = paired(_nats_of(ours), _nats_of(best), league.conditions.seed)
            who = "planned" if high < 0 else best.entry if low > 0 else "not clear"
            shown = f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"
            told = [f"{_mean_nats(ours):.3f}", f"{best.entry} {_mean_nats(best):.3f}"]
            rows.append([workload, point_name(point), *told, shown, who])
    if not rows:
        return []
    heads = ["workload", "bytes", "planned", "best of the others", "difference, 95 %", "better"]
    return [
        f"### By likelihood, {league.conditions.model}",
        "",
        "Nats per token of the true answers, or of the text; fewer are better. Codes of all tokens "
        "take part where they fit.",
        "",
        markdown(heads, rows, tight=True),
        "",
    ]


def _nats_of(cell: Cell) -> tuple[float, ...]:
    assert cell.outcome is not None
    return cell.outcome.answer_nats or ()


def _mean_nats(cell: Cell) -> float:
    return fmean(_nats_of(cell))


def _fastgen(league: League) -> list[str]:
    """FastGen's own figure."""
    names = [row.name for row in league.rows if row.role == "own"]
    texts = [name for name in league.workloads if KNOWN[name].text]
    if not names or not texts:
        return []
    whole = {cell.workload: share(cell) for cell in _of(league, "int8")}
    rows = []
    for name in names:
        cells = {cell.workload: cell for cell in _of(league, name)}
        shown = [cells[w] for w in texts if w in cells and w in whole]
        if shown:
            pruned = 1 - fmean(share(cell) / whole[cell.workload] for cell in shown)
            held = fmean(map(share, shown))
            told = [name.removeprefix("fastgen "), f"{100 * pruned:.1f} %", f"{held:.3f}"]
            rows.append([*told, *map(_kl, shown)])
    heads = ["rule", "pruned", "bytes of the 16-bit cache", *(f"KL, {name}" for name in texts)]
    return [
        f"### FastGen's own figure, {league.conditions.model}",
        "",
        "Its rule alone decides: per head the cheapest keep-set that keeps T of the attention. "
        "What is kept lies in int8; pruned: by how much it holds less than int8 of all tokens.",
        "",
        markdown(heads, rows, tight=True),
        "",
    ]


def _kl(cell: Cell) -> str:
    assert cell.outcome is not None and cell.outcome.kl_nats is not None
    return f"{fmean(cell.outcome.kl_nats):.4f}"


def _plain(found: Record | None) -> list[str]:
    """The same figures by a script that shares no code with the package."""
    if not found:
        return []
    rows = []
    for workload, both in found["workloads"].items():
        for name, ours in both["package"].items():
            theirs: Any = both["plain"][name]
            rows.append([workload, name, f"{ours:.5f}", f"{theirs:.5f}", f"{ours - theirs:+.1e}"])
    point = point_name(found["point"])
    return [
        "### Plain transformers beside it",
        "",
        f"`tools/reference_kl.py` shares no code with the package. It reads what {found['entry']} "
        f"at {point} saw and said, runs the full model without any cache, and works the figures "
        "out by itself.",
        "",
        markdown(["workload", "figure", "package", "plain", "difference"], rows, tight=True),
        "",
    ]


def _conditions(league: League, data: Record) -> list[str]:
    told = league.conditions
    packages = ", ".join(f"{name} {number}" for name, number in told.versions.items())
    texts = ", ".join(f"{name} {digest[:12]}" for name, digest in data.get("texts", {}).items())
    return [
        f"Conditions: {told.date}; {told.machine}; computed in {told.dtype}, bytes those of 16 "
        f"bits; {packages}; weights {told.weights_hash[:16]}; {told.context_tokens} tokens of "
        f"context; calibration: {told.calibration}; runs of {told.window_tokens} tokens that it "
        f"shares with evaluation: {told.shared_windows}; texts by sha256: {texts}; "
        f"{told.seconds / 60:.0f} minutes of one process for all cells.",
        "",
    ]


def _of(league: League, entry: str) -> list[Cell]:
    return [c for c in league.cells if c.entry == entry and c.outcome is not None]
