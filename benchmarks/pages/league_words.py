"""The verdicts in plain words; every number comes from the league."""

from __future__ import annotations

from typing import Final

from kvcompress.evaluate.workloads_table import RANKED_FROM
from kvcompress.league.result import point_name
from kvcompress.league.verdicts import RETAINED, PointVerdict, Standing, Verdicts, Versus

EIGHTH: Final = 1 / 8


def verdict_lines(verdicts: Verdicts) -> list[str]:
    """The verdict section, as Markdown lines."""
    found = [v for v in verdicts.points if v.planned and v.ranked]
    if not found:
        return ["No planned entry took part, so there is nothing to say about one.", ""]
    return [
        *_front(found),
        *_eighth(found),
        *_joint(found),
        *_losses(found),
        *_baselines(verdicts),
        *_not_ranked(verdicts),
    ]


def _front(found: list[PointVerdict]) -> list[str]:
    """Show 1: on the front at every byte point of every task."""
    on = [v for v in found if v.on_front]
    tied = [v for v in on if _own(v) == "tied"]
    off = [v for v in found if not v.on_front]
    lines = [
        f"**On the Pareto front: {len(on)} of {len(found)}** (workload, byte point) pairs. There "
        "no other entry scores higher in at most the same bytes, a planned entry at other sizes "
        "and its two parts aside.",
        "",
    ]
    if tied:
        where = ", ".join(f"{_at(v)} ({_above(v)})" for v in tied)
        lines += [f"Of these, an entry with clearly fewer bytes scores as high: {where}.", ""]
    if off:
        clear = sum(_beaten_clearly(v) for v in off)
        lines += [f"Off the front, {clear} of them clearly, zero outside of the interval:", ""]
        lines += [f"- {_at(v)}: {_above(v)} is above {v.planned}, {_gap(v)}" for v in off]
        lines.append("")
    return lines


def _eighth(found: list[PointVerdict]) -> list[str]:
    """Show 1: at 1/8, the share of the full recall, and the margin to the published methods."""
    here = [v for v in found if v.point == EIGHTH]
    if not here:
        return []
    lines = []
    hidden = next((v for v in here if v.workload == "hidden"), None)
    if hidden is not None and hidden.retained is not None:
        kept = "and so keeps" if hidden.retained >= RETAINED else "and so misses"
        lines += [
            f"**At 1/8, question hidden:** {hidden.planned} answers {_percent(_score(hidden))} "
            f"where the full cache answers {_percent(hidden.reference)}, "
            f"{hidden.retained:.3f} of it, {kept} the {RETAINED} that we set out for.",
            "",
        ]
    rivals = [(v, v.versus_published) for v in here if v.versus_published is not None]
    clear = [v for v, rival in rivals if rival.interval[0] > 0]
    lines += [
        f"**At 1/8, against the best published method of each workload:** clearly ahead on "
        f"{len(clear)} of {len(rivals)}. Codes of every token count as a method where they fit.",
        "",
        "| workload | planned | best published | difference, 95 % | verdict |",
        "|---|---|---|---|---|",
    ]
    for v, rival in rivals:
        lines.append(
            f"| {v.workload} | {v.planned} {_percent(_score(v))} | {rival.rival} "
            f"{_percent(rival.rival_score)} | {_margin(rival)} | {_which(rival)} |"
        )
    return [*lines, ""]


def _joint(found: list[PointVerdict]) -> list[str]:
    """Show 2: tokens and bits together against tokens alone and bits alone."""
    rivals = [(v, v.versus_parts) for v in found if v.versus_parts is not None]
    if not rivals:
        return []
    behind = [(v, rival) for v, rival in rivals if rival.difference < 0]
    clear = [v for v, rival in rivals if rival.interval[0] > 0]
    lines = [
        f"**Joint against parts:** at least the better of tokens alone and bits alone in "
        f"{len(rivals) - len(behind)} of {len(rivals)} pairs, clearly above it in {len(clear)}.",
        "",
    ]
    lines += [f"- {_at(v)}: {rival.rival} is ahead, {_margin(rival)}" for v, rival in behind]
    return [*(lines if not behind else [*lines, ""]), *_joint_kl(found)]


def _joint_kl(found: list[PointVerdict]) -> list[str]:
    """The same by KL on text, where the full cache is no worse for being itself."""
    pairs = [
        (v, v.kl_nats, v.kl_parts)
        for v in found
        if v.workload == "hidden" and v.kl_nats is not None and v.kl_parts is not None
    ]
    if not pairs:
        return []
    shown = ", ".join(f"{point_name(v.point)} {ours:.4f} ({part:.4f})" for v, ours, part in pairs)
    better = sum(ours <= part for _, ours, part in pairs)
    return [
        f"By KL on text, which does not hang on single answers, joint is at least as good at "
        f"{better} of {len(pairs)} byte points; in nats, the better part in brackets: {shown}.",
        "",
    ]


def _losses(found: list[PointVerdict]) -> list[str]:
    """Every pair in which a published method or a baseline is at least as good as ours."""
    lines = []
    for v in found:
        rival = v.versus_published
        if rival is not None and rival.difference <= 0:
            how = "ties with" if rival.difference == 0 else "loses to"
            clear = " clearly" if rival.interval[1] < 0 else ""
            lines.append(f"- {_at(v)}: {v.planned}{clear} {how} {rival.rival}, {_margin(rival)}")
    label = [v for v in found if _label(v) == "baseline"]
    if label:
        where = ", ".join(f"{_at(v)} ({v.baseline})" for v in label)
        lines.append(f"- labelled `baseline`, not above the best trivial one: {where}")
    if not lines:
        return ["**Where ours loses:** nowhere in this league.", ""]
    return ["**Where ours does not win** against the best published method:", "", *lines, ""]


def _baselines(verdicts: Verdicts) -> list[str]:
    """Who is labelled a baseline how often."""
    counts: dict[str, list[int]] = {}
    for v in filter(lambda v: v.ranked, verdicts.points):
        for standing in v.standings:
            if standing.label is not None:
                tally = counts.setdefault(standing.entry, [0, 0])
                tally[0] += standing.label == "baseline"
                tally[1] += 1
    always = [name for name, (times, all_) in counts.items() if times == all_]
    often = [
        f"{name} {times} of {all_}"
        for name, (times, all_) in sorted(counts.items(), key=lambda item: -item[1][0])
        if 2 * times >= all_ and name not in always
    ]
    lines = []
    if always:
        lines.append(f"Never above the best trivial baseline: {', '.join(sorted(always))}.")
    if often:
        lines.append(f"Not above it in half of the pairs or more: {', '.join(often)}.")
    return ["**Labelled `baseline`:** " + " ".join(lines), ""] if lines else []


def _not_ranked(verdicts: Verdicts) -> list[str]:
    """Workloads that the full cache itself fails."""
    scores = {v.workload: v.reference for v in verdicts.points if not v.ranked}
    told = [f"{name} ({_percent(score)})" for name, score in scores.items()]
    if not told:
        return []
    return [
        f"**Not ranked,** as the full cache itself scores below {RANKED_FROM:.0%}: "
        f"{', '.join(told)}.",
        "",
    ]


def _own(verdict: PointVerdict) -> str:
    return _standing(verdict).place


def _above(verdict: PointVerdict) -> str:
    rival = _standing(verdict).above
    if rival is None:
        return "nothing"
    size = "" if rival.rival_point == verdict.point else f" at {point_name(rival.rival_point)}"
    return f"{rival.rival}{size}"


def _beaten_clearly(verdict: PointVerdict) -> bool:
    rival = _standing(verdict).above
    return rival is not None and rival.interval[1] < 0


def _gap(verdict: PointVerdict) -> str:
    rival = _standing(verdict).above
    return "" if rival is None else _margin(rival)


def _score(verdict: PointVerdict) -> float:
    return _standing(verdict).score


def _label(verdict: PointVerdict) -> str | None:
    return _standing(verdict).label


def _standing(verdict: PointVerdict) -> Standing:
    return next(s for s in verdict.standings if s.entry == verdict.planned)


def _at(verdict: PointVerdict) -> str:
    return f"{verdict.workload} at {point_name(verdict.point)}"


def _which(rival: Versus) -> str:
    if rival.interval[0] > 0:
        return "ahead"
    if rival.interval[1] < 0:
        return "behind"
    return "not clear"


def _margin(rival: Versus) -> str:
    low, high = rival.interval
    return f"{100 * rival.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
