"""What it costs to estimate attention sums: ranks, kept tokens, and what the model then says.

    python benchmarks/estimated_sums.py      # benchmarks/results/estimated_sums.json and its tables
    python benchmarks/estimated_sums.py --table                     # the tables of what is there

On the shipped model, for several numbers of voters (`score_rows`, `score_stride`; see
docs/heavy-hitters.md): how the ranks of a prompt's tokens agree with those by exact sums, and, for
plans that the planner made from profiles with the same voters and for H2O by lift, the KL between
the full cache's predictions and the plan's: on the tokens of the true answers to questions that
come after compression (workloads hidden, second_turn, long_span), and on held-out text. Every
finished measurement is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from studies import (
    RESULTS,
    Record,
    answer_log_probabilities,
    fitting,
    gap,
    parser_of,
    shipped,
    shown,
    summary,
)
from torch import Tensor

from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.serving import serving
from kvcompress.evaluate.session import Session
from kvcompress.evaluate.text import text_losses, window_logits
from kvcompress.evaluate.workloads import WorkloadSuite, make_workloads
from kvcompress.evict.score_queries import pair_weight
from kvcompress.league.profiles import Profiles
from kvcompress.measure.cells import Book
from kvcompress.measure.tables import markdown
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.profile.calibration import load_prompts
from kvcompress.profile.collect import forward
from kvcompress.profile.hf import LayerInput, attention_through
from kvcompress.profile.solve import solve
from kvcompress.profile.store import PARAMS_FILE
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import BytesPolicy, Calibration, Keep, Recipe
from kvcompress.runtime.model.families import shape_of

RESULT: Final = RESULTS / "estimated_sums.json"
Voters = tuple[int | None, int | None]  # score_rows, score_stride
EXACT: Final[Voters] = (None, None)
ESTIMATES: Final[tuple[Voters, ...]] = tuple((n, s) for s in (8, 32) for n in (32, 64, 128))
WINDOWS: Final[tuple[Voters, ...]] = ((64, None),)
RANKED: Final[tuple[Voters, ...]] = (*ESTIMATES, (32, None), (64, None), (128, None))
NEAR_TOO: Final = "64, 1 in 32, near tokens too"
SCORERS: Final = ("raw", "mean", "lift")
SHARES: Final = (4, 8, 16)
KINDS: Final = ("planned", "h2o-lift")
WORKLOADS: Final = ("hidden", "second_turn", "long_span")
CONTEXT: Final = 960
SINKS, RECENT = 4, 16


def named(score_queries: Voters) -> str:
    rows, stride = score_queries
    if rows is None:
        return "exact"
    return f"last {rows}" if stride is None else f"{rows}, 1 in {stride}"


def keep_of(score_queries: Voters, scorer: str = "lift") -> Keep:
    return Keep(scorer=scorer, score_rows=score_queries[0], score_stride=score_queries[1])


# ---- ranks
def ranks(attention: Tensor, scorer: str, score_queries: Voters, near: int | None = None) -> Tensor:
    """``[Hkv, S]`` from attention ``[Hkv, S, S]`` at a prompt's end.

    Args:
        near: keys that every row votes for where sums are estimated; None: as many as rows.
    """
    rows, stride = score_queries
    length = attention.shape[-1]
    number = torch.arange(length)
    first = 0 if rows is None else length - rows
    weight = (number >= first).double()[:, None]
    seen = length - number.clamp(min=first)
    if rows is not None and stride is not None:
        weight = pair_weight(number, number, first, rows if near is None else near, stride).double()
        seen = length - number
    if scorer == "lift":
        weight = weight * (number + 1)[:, None]
    sums = (attention.double() * weight).sum(1)
    return sums if scorer == "raw" else sums / seen


def agreement(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Per scorer and voters: rank correlation with exact sums, and share of the exactly best
    tokens among the best; means over heads, layers and prompts. Sinks and recent tokens, which
    are kept in any case, are left out."""
    found: dict[str, list[list[float]]] = {}
    names = {f"{s}: {named(v)}": (s, v, None) for s in SCORERS for v in RANKED}
    names |= {f"{s}: {NEAR_TOO}": (s, (64, 32), 0) for s in SCORERS}

    def run(given: LayerInput) -> Tensor:
        logits = given.query @ given.key.mT[:, None] * given.softmax.scaling
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        exact = {s: _inner(ranks(attention.mean(1), s, EXACT)) for s in SCORERS}
        for name, (scorer, score_queries, near) in names.items():
            own = _inner(ranks(attention.mean(1), scorer, score_queries, near))
            values = [_spearman(own, exact[scorer])]
            values += [_overlap(own, exact[scorer], share) for share in SHARES]
            found.setdefault(name, []).append(values)
        return attention @ given.value[:, None]

    shape = shape_of(model.config, model.dtype)
    with attention_through(model, shape, run):
        for ids in load_prompts(Calibration(prompts=6, tokens=1024, seed=5), tokenizer):
            forward(model, ids)
    keys = ("rank_correlation", *(f"best_1_in_{share}" for share in SHARES))
    means = {name: torch.tensor(each).mean(0).tolist() for name, each in found.items()}
    return {
        name: {key: round(x, 4) for key, x in zip(keys, mean, strict=True)}
        for name, mean in means.items()
    }


def _inner(rank: Tensor) -> Tensor:
    return rank[:, SINKS:-RECENT]


def _spearman(a: Tensor, b: Tensor) -> float:
    x, y = (t.argsort(-1).argsort(-1).double() for t in (a, b))
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())


def _overlap(a: Tensor, b: Tensor, share: int) -> float:
    count = a.shape[-1] // share
    chosen = torch.zeros(2, *a.shape, dtype=torch.bool)
    for own, rank in zip(chosen, (a, b), strict=True):
        own.scatter_(-1, rank.topk(count).indices, True)
    return float((chosen[0] & chosen[1]).sum(-1).double().mean() / count)


# ---- what the model then says
def plan_of(profiles: Profiles, kind: str, share: int, score_queries: Voters) -> Plan:
    """The byte planner's plan, or H2O by lift, at one in `share` of the 16-bit bytes."""
    profile, _ = profiles.of(Recipe(keep=keep_of(score_queries)))
    if kind == "planned":
        policy = BytesPolicy(kind="bytes", keep_ratio=1 / share, context=CONTEXT)
        return solve(profile, policy, keep_of(score_queries))

    def made(tokens: int) -> Plan:
        head = HeadPlan(frequent=Budget(tokens=tokens), local=Budget(tokens=RECENT + tokens))
        rows, stride = score_queries
        return uniform(profile.shape, head, score_rows=rows, score_stride=stride)

    return fitting(made, profile.shape.bf16_kv_bytes(CONTEXT, 1) // share, CONTEXT)


def predictions(
    model: Any, tokenizer: Any, suite: WorkloadSuite, plan: Plan | None, params: Any
) -> tuple[list[Tensor], Tensor | None]:
    """Log-probabilities of each question's answer tokens ``[n, vocabulary]``, and the logits of
    the text windows."""
    pad = tokenizer.pad_token_id or 0
    answers: list[Tensor] = []
    with serving(model, plan, params) as new_cache:
        for number, document in enumerate(suite.documents):
            asked = [
                (q.text, q.answer)
                for sample in suite.samples
                if sample.document == number
                for q in sample.questions
            ]
            session = Session(model, new_cache(), pad)
            said = answer_log_probabilities(session, tokenizer, document.prompt, asked)
            answers += [rows for rows, _ in said]
        logits = None
        if suite.windows is not None:
            logits = window_logits(
                lambda: Session(model, new_cache(), pad),
                suite.windows,
                suite.context_tokens,
                feed_tokens=suite.feed_tokens,
                batch_rows=8,
            )
    return answers, logits


def distances(
    suite: WorkloadSuite, full: tuple[list[Tensor], Tensor | None], other: Any
) -> dict[str, list[float]]:
    """KL to the full cache in nats per token, of each question's answer and of each window."""
    pairs = zip(full[0], other[0], strict=True)
    found = {"answer_kl": [round(float((p.exp() * (p - q)).sum(-1).mean()), 5) for p, q in pairs]}
    if full[1] is not None and suite.windows is not None:
        losses = text_losses(other[1], full[1], suite.windows[:, suite.context_tokens :])
        found["text_kl"] = [round(float(x), 6) for x in losses.kl.mean(1)]
    return found


def measure(cells: Book, samples: int, folder: Path) -> None:
    model, tokenizer = shipped()
    cells.get("agreement", lambda: agreement(model, tokenizer))
    profiles = Profiles(model, tokenizer, folder)
    limit = shape_of(model.config, model.dtype).max_position
    suites = make_workloads(tokenizer, Sizes(CONTEXT, limit), names=WORKLOADS, samples=samples)
    full = {
        s.workload: cache(partial(predictions, model, tokenizer, s, None, None)) for s in suites
    }

    def cell(suite: WorkloadSuite, kind: str, share: int, score_queries: Voters) -> Record:
        plan = plan_of(profiles, kind, share, score_queries)
        where = profiles.of(Recipe(keep=keep_of(score_queries)))[1]
        params = KVParams.load(where / PARAMS_FILE, plan.model)
        said = predictions(model, tokenizer, suite, plan, params)
        scored = [h for row in plan.heads for h in row if h.frequent is not None]
        return {
            "kv_bytes": kv_bytes(plan, CONTEXT, 1),
            "heads_that_score": len(scored),
            **distances(suite, full[suite.workload](), said),
        }

    for score_queries in (EXACT, *ESTIMATES, *WINDOWS):
        for kind, share, suite in product(KINDS, SHARES, suites):
            name = f"{kind} 1/{share} {suite.workload}: {named(score_queries)}"
            cells.get(name, partial(cell, suite, kind, share, score_queries))


# ---- tables
def agreement_table(cells: dict[str, Any]) -> str:
    """Rank correlation, and share of the exactly best eighth that is found, by scorer."""
    rows = []
    for name in (*map(named, RANKED[: len(ESTIMATES)]), NEAR_TOO, *map(named, RANKED[-3:])):
        found = [cells["agreement"][f"{scorer}: {name}"] for scorer in SCORERS]
        figures = ((own["rank_correlation"], own["best_1_in_8"]) for own in found)
        rows.append([name, *(f"{x:.2f}" for pair in figures for x in pair)])
    headings = ["voters", *(f"{s} {word}" for s in SCORERS for word in ("ρ", "1/8"))]
    return markdown(headings, rows, numbers_from=1, tight=True)


def quality_table(cells: dict[str, Any]) -> str:
    """KL to the full cache by plan and voters, beside exact sums."""
    rows = []
    for kind, share, score_queries in product(KINDS, SHARES, (EXACT, *ESTIMATES, *WINDOWS)):
        rows += _quality_row(cells, f"{kind} 1/{share}", score_queries)
    headings = ["plan", "voters", "heads that score", "answers", "− exact", "text", "− exact"]
    return markdown(headings, rows, numbers_from=2, tight=True)


def _quality_row(cells: dict[str, Any], plan: str, score_queries: Voters) -> list[list[str]]:
    own, exact = (
        [cells.get(f"{plan} {w}: {named(v)}") for w in WORKLOADS] for v in (score_queries, EXACT)
    )
    if any(c is None for c in (*own, *exact)):
        return []
    row = [plan, named(score_queries), str(own[0]["heads_that_score"])]
    for name in ("answer_kl", "text_kl"):
        mine, theirs = _joined(own, name), _joined(exact, name)
        change = "" if score_queries == EXACT else gap(mine, theirs, name, digits=4)
        row += [shown(summary(mine, name), 1, 4), change]
    return [row]


def _joined(cells: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return {name: [x for cell in cells for x in cell.get(name, [])]}


def main() -> None:
    parser = parser_of(__doc__, RESULT, 96)
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--profiles", type=Path, help="folder that keeps the profiles")
    args = parser.parse_args()
    model = "kvcompress/demo/model"
    told = {"model": model, "context_tokens": CONTEXT, "questions": args.samples}
    cells = Book(args.json, told)
    if not args.table:
        with tempfile.TemporaryDirectory() as own:
            measure(cells, args.samples, args.profiles or Path(own))
    print(agreement_table(cells.cells), quality_table(cells.cells), sep="\n\n")


if __name__ == "__main__":
    main()
