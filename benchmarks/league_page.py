"""The league as a page with its pictures; made from the data alone, no model needed.

    python benchmarks/league_page.py                                  # docs/league.md
    python benchmarks/league_page.py runs/league/league.json runs/league/league.md

What somebody wrote beside a league.json for its page, in ``league.notes.md``, stands behind the
verdicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pages.league_plots import draw_all
from pages.league_words import verdict_lines

from kvcompress.atomic import write_file
from kvcompress.evaluate.workloads import KNOWN
from kvcompress.league.entries import BITS_ONLY
from kvcompress.league.result import Cell, League, point_name
from kvcompress.league.tables import LEGEND, TableRow, kl_rows, score_rows
from kvcompress.league.tune import TOLERANCE
from kvcompress.league.verdicts import Verdicts, judge, share
from kvcompress.measure.stats import interval
from kvcompress.measure.tables import markdown
from kvcompress.tasks.documents import read_text

ROOT: Final = Path(__file__).parents[1]
_RULES: Final = """\
## Rules

- **Equal bytes.** Bytes are those of all tensors of the cache when the first question comes,
  metadata included. Every entry gets the largest size that fits the target; a plan whose bytes
  depend on the text is sized on three calibration prompts.
- **One rule for all.** Sinks and recent tokens stay in 16 bits and may take a third of the target;
  where a recipe wants more, sinks shrink to a quarter of what is allowed and recent tokens to the
  rest. Budgets of all heads shrink or grow by one factor; FastGen's recovery and the planner's
  byte target are turned first. Ratios are taken at the length at which bytes are counted.
- **Storage.** {storage}
- **Tokens-only, bits-only.** The planner of the entry, choosing tokens alone with all of them in
  int8, which holds 1.8 times the tokens of 16 bits; or choosing bits alone, every token kept.
- **Recall tier.** It keeps every token, most of them in host memory. The tables show both parts;
  it is not ranked, because no byte point is that of both.
- **Baseline.** An entry that is not above the best trivial baseline (role `baseline` below)
  at its point is labelled so, ours included.
- **Best rival.** The one with the highest mean on the very samples that are compared; this
  favours the rival. Intervals are 95 % bootstrap over samples; differences are paired.
"""
_STORAGE: Final = {
    "recipe": "Every recipe keeps the storage that it names; where it names none, 16 bits.",
    "int8": "Recipes that leave kept tokens in 16 bits store them in int8 here, which gives them "
    "1.8 times the tokens at equal bytes and makes them stronger. Recipes that name a code keep "
    "it. Every entry has the same key constants.",
    "int4": "Recipes that leave kept tokens in 16 bits store them in int4 here. Recipes that name "
    "a code keep it. Every entry has the same key constants.",
}


def write_pages(league: League, verdicts: Verdicts, page: Path, notes: str = "") -> None:
    """Write `page`, and its pictures into a folder of its name beside it.

    Args:
        notes: Markdown that stands behind the verdicts: what numbers cannot say of themselves.

    Raises:
        KVCompressError: where matplotlib is not installed.
    """
    pictures = page.with_suffix("")
    draw_all(league, pictures, {name: title(name) for name in league.workloads})
    write_file(page, render(league, verdicts, pictures.name, notes))


def title(workload: str) -> str:
    """``D1 hidden: question unknown while ...``."""
    known = KNOWN.get(workload)
    return workload if known is None else f"{known.axis} {workload}: {known.summary}"


def render(league: League, verdicts: Verdicts, pictures: str, notes: str = "") -> str:
    """The page as Markdown; `pictures` is the folder of its images."""
    lines = [
        "# League",
        "",
        "Every recipe at equal measured bytes on every workload, on "
        f"`{league.conditions.model}`. This page is made by `benchmarks/league_page.py`; no "
        "number on it is typed by hand.",
        "",
        f"![Score against bytes, all workloads]({pictures}/overview.png)",
        "",
        "Score: questions answered word for word. Red band: 95 % interval of the planned entry.",
        LEGEND,
        "",
        "## Verdicts",
        "",
        *verdict_lines(verdicts),
    ]
    if notes:
        lines += [notes.strip(), ""]
    for workload in league.workloads:
        lines += [f"## {title(workload)}", "", *_table(score_rows(league, verdicts, workload))]
        lines += [f"![{workload}]({pictures}/{workload}.png)", ""]
    lines += [*_text(league), *_predicted(league)]
    lines += [_RULES.format(storage=_STORAGE[league.conditions.storage])]
    lines += [*_bytes(league), *_conditions(league), *_entries(league)]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[TableRow]) -> list[str]:
    return [markdown(list(rows[0]), [list(row.values()) for row in rows], tight=True), ""]


def _text(league: League) -> list[str]:
    """KL to the full cache, on the workloads that the model is made for."""
    lines = []
    for workload in league.workloads:
        known = KNOWN.get(workload)
        measured = any(
            cell.outcome is not None and cell.outcome.kl_nats is not None
            for cell in league.cells
            if cell.workload == workload
        )
        if measured and not (known is not None and known.beyond):
            lines += [f"## KL to the full cache, {workload}", ""]
            lines += ["Mean nats per token on held-out text behind a compressed prefix.", ""]
            lines += _table(kl_rows(league, workload))
    return lines


def _predicted(league: League) -> list[str]:
    """What a profile predicts of a plan beside what was measured.

    Entries that are sized by one factor have left what their profile measured, and so have heads
    that may not drop a token or bring it back.
    """
    foreseen = {
        row.name
        for row in league.rows
        if row.role in ("planned", "part", "quantization") and not row.name.endswith(BITS_ONLY)
    }
    rows = []
    for cell in league.cells:
        done = cell.outcome
        if cell.predicted_nats is None or done is None or done.kl_nats is None:
            continue
        if cell.entry not in foreseen:
            continue
        known = KNOWN.get(cell.workload)
        if known is None or not known.beyond:
            mean, (low, high) = interval(done.kl_nats, league.conditions.seed)
            rows.append(
                [
                    cell.entry,
                    point_name(cell.point),
                    cell.workload,
                    f"{cell.predicted_nats:.4f}",
                    f"{mean:.4f} [{low:.4f}, {high:.4f}]",
                ]
            )
    if not rows:
        return []
    return [
        "## Predicted and measured",
        "",
        "KL to the full cache in nats per token: as a plan's profile predicts it for calibration "
        "prompts, and as measured on held-out text, 95 % interval over windows behind it. Three "
        "calibration prompts in four end in questions on notes, where dropped tokens cost most; "
        "plain text is kinder, so predictions order plans and lie above what text shows.",
        "",
        markdown(["entry", "bytes", "workload", "predicted", "measured"], rows, tight=True),
        "",
    ]


def _bytes(league: League) -> list[str]:
    """How equal the bytes are."""
    cells = [c for c in league.cells if c.outcome is not None and c.point is not None]
    if not cells:
        return []
    ratios = {id(cell): share(cell) / cell.point for cell in cells if cell.point is not None}
    over = [cell for cell in cells if ratios[id(cell)] > 1 + TOLERANCE]
    under = [cell for cell in cells if ratios[id(cell)] < 1 - TOLERANCE]
    lines = [
        "## Bytes",
        "",
        f"Of {len(cells)} cells at a target, {len(cells) - len(over) - len(under)} measured within "
        f"{TOLERANCE:.0%} of it, {len(under)} below and {len(over)} above. An entry below found no "
        "larger plan that fits, or its prompts took fewer bytes than those it was sized on.",
        "",
    ]
    return [*lines, *_listed("above", over, ratios), *_listed("below", under, ratios)]


def _listed(word: str, cells: Sequence[Cell], ratios: dict[int, float]) -> list[str]:
    if not cells:
        return []
    worst: dict[tuple[str, float | None], float] = {}
    for cell in cells:
        key, ratio = (cell.entry, cell.point), ratios[id(cell)]
        known = worst.get(key, 1.0)
        worst[key] = ratio if abs(ratio - 1) > abs(known - 1) else known
    parts = [
        f"{name} at {point_name(point)} ({ratio:.2f})" for (name, point), ratio in worst.items()
    ]
    return [f"Furthest {word}, as a share of the target: {', '.join(parts)}.", ""]


def _conditions(league: League) -> list[str]:
    told = league.conditions
    lengths = ", ".join(f"{name} {tokens}" for name, tokens in told.lengths.items())
    shared = (
        f"calibration and evaluation share no run of {told.window_tokens} tokens"
        if told.shared_windows == 0
        else f"calibration and evaluation share {told.shared_windows} runs of "
        f"{told.window_tokens} tokens"
    )
    lines = [
        "## Conditions",
        "",
        f"- {told.date}; {told.machine}; device {told.device}, dtype {told.dtype}; "
        + ", ".join(f"{name} {number}" for name, number in told.versions.items()),
        f"- model `{told.model}`, weights {told.weights_hash[:16]}",
        f"- {told.samples} samples per workload, seed {told.seed}; tokens at which bytes are "
        f"counted: {lengths}",
        f"- calibration: {told.calibration}; {shared}",
        f"- {told.seconds / 60:.0f} minutes of one process for all cells",
    ]
    if told.other_code:
        lines.append(f"- {told.other_code} cells were measured by an earlier state of the code")
    return [*lines, ""]


def _entries(league: League) -> list[str]:
    """Who took part, and what did not run."""
    told = [[row.name, row.role, row.description + _same(row.same_as)] for row in league.rows]
    table = markdown(["entry", "role", "what it is"], told, tight=True)
    lines = ["## Entries", "", table]
    missing = [f"- {row.name}: {row.reason}" for row in league.skipped]
    failed: dict[tuple[str, str], list[str]] = {}
    for cell in league.cells:
        if cell.error:
            what = "no plan so small" if cell.unreachable else "failed"
            where = failed.setdefault((cell.entry, f"{what}: {cell.error}"), [])
            where.append(f"{cell.workload} at {point_name(cell.point)}")
    for (entry, error), where in failed.items():
        shown = where if len(where) <= 3 else [*where[:3], f"{len(where) - 3} more"]
        missing.append(f"- {entry} ({', '.join(shown)}): {error}")
    return [*lines, "", "## Not run", "", *missing, ""] if missing else [*lines, ""]


def _same(names: Sequence[str]) -> str:
    return f"; same as {', '.join(names)}" if names else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    results = ROOT / "benchmarks" / "results" / "league.json"
    parser.add_argument("league", type=Path, nargs="?", default=results, help="a league.json")
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "league.md")
    args = parser.parse_args()
    league = League.load(args.league)
    notes = args.league.with_suffix(".notes.md")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write_pages(league, judge(league), args.page, read_text(notes) if notes.is_file() else "")


if __name__ == "__main__":
    main()
