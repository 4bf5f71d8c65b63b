"""Heavy hitters by raw sums, by mean and by lift, side by side at equal bytes.

    python benchmarks/heavy_hitters.py       # table, benchmarks/results/heavy_hitters.json, figures

On the shipped model: every head keeps the same number of tokens, a fifth of them the newest and the
rest by score, in int8. The scorers differ in how they add attention up, and in which prompt rows
may vote. Beside them the same bytes of newest tokens and of tokens drawn at random. See
docs/heavy-hitters.md.
"""

from __future__ import annotations

from typing import Any

import torch
from pages.plots import pyplot
from studies import (
    CONTEXT,
    FIGURES,
    RESULTS,
    conditions,
    fitting,
    gap,
    held_positions,
    parser_of,
    percent,
    quality,
    setting,
    summary,
)

from kvcompress.evaluate.quality import measure
from kvcompress.measure.cells import Book
from kvcompress.measure.tables import markdown
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.profile.calibration import load_prompts
from kvcompress.profile.measure import Setup, measure_prompt
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import Calibration, Keep
from kvcompress.runtime.model.families import shape_of

RATIOS = (4, 8, 16)
WAYS: tuple[tuple[str, int | None], ...] = (
    ("raw", None), ("mean", None), ("lift", None), ("lift", 64), ("lift", 32),
    ("random", None), ("newest", None),
)  # fmt: skip
# with few voting rows the three differ little: their weights and votes are nearly the same
MORE_AT_EIGHTH: tuple[tuple[str, int | None], ...] = (("raw", 32), ("mean", 32))
BINS = 16


def ways(share: int) -> tuple[tuple[str, int | None], ...]:
    """What is measured at 1 / `share` of the bytes."""
    return WAYS + (MORE_AT_EIGHTH if share == 8 else ())


def label(scorer: str, rows: int | None) -> str:
    return scorer if rows is None else f"{scorer}, last {rows} rows"


def head_of(tokens: int, scorer: str) -> HeadPlan:
    """`tokens` coded tokens: a fifth newest, the rest by score; or all newest."""
    if scorer == "newest":
        return HeadPlan(local=Budget(tokens=16 + tokens))  # the 16 newest are held uncoded
    local = tokens // 5
    return HeadPlan(frequent=Budget(tokens=tokens - local), local=Budget(tokens=16 + local))


def plan_for(shape: Any, share: int, scorer: str, rows: int | None) -> Plan:
    """The largest plan of this kind within 1 / `share` of the bf16 bytes."""
    target = shape.bf16_kv_bytes(CONTEXT, 1) // share
    ranked = "lift" if scorer == "newest" else scorer

    def made(tokens: int) -> Plan:
        return uniform(shape, head_of(tokens, scorer), scorer=ranked, score_rows=rows)

    return fitting(made, target, CONTEXT)


def recovery(model: Any, tokenizer: Any, shape: Any) -> dict[str, Any]:
    """Attention mass of held-out rows that each way keeps; what a FastGen profile sees.

    Per byte ratio: mean over heads and prompts of what all but 5 % of the rows reach.
    """
    prompts = load_prompts(Calibration(prompts=8, tokens=CONTEXT, seed=11), tokenizer)
    params = KVParams(
        tuple(torch.zeros(shape.kv_heads, shape.head_dim) for _ in range(shape.layers)),
        tuple(torch.ones(shape.kv_heads, shape.head_dim) for _ in range(shape.layers)),
    )
    found = {}
    for scorer, rows in WAYS + MORE_AT_EIGHTH:
        plans = [plan_for(shape, share, scorer, rows) for share in RATIOS]
        heads = tuple(plan.heads[0][0] for plan in plans)
        keep = Keep(scorer=plans[0].scorer, score_rows=rows)
        setup = Setup(shape, keep, (), (), heads, (), params, gradients=False)
        results = [measure_prompt(model, setup, ids) for ids in prompts]
        reached = torch.stack([r.recovery for r in results]).mean((0, 1, 2))
        found[label(scorer, rows)] = {"recovery": [round(float(x), 4) for x in reached]}
    return found


def histogram(model: Any, tokenizer: Any, shape: Any) -> dict[str, Any]:
    """Share of the tokens kept by score in each sixteenth of a prompt, at 1/8 of the bytes."""
    prompts = load_prompts(Calibration(prompts=8, tokens=CONTEXT, seed=13), tokenizer)
    found = {}
    for scorer, rows in WAYS[:-1]:
        plan = plan_for(shape, 8, scorer, rows)
        local = plan.heads[0][0].local
        assert local is not None and local.tokens is not None
        last = CONTEXT - local.tokens
        counts = torch.zeros(BINS)
        for layer in held_positions(model, plan, torch.tensor(prompts)):
            for row in layer:
                for held in row:
                    chosen = torch.tensor([p for p in held if p < last])
                    counts += torch.bincount(chosen * BINS // CONTEXT, minlength=BINS)
        found[label(scorer, rows)] = [round(float(x), 4) for x in counts / counts.sum()]
    return found


def uniform_attention(length: int) -> dict[str, list[float]]:
    """Rank of token i after `length` rows that attend to all they see alike, every 16th token.

    Row q gives each of its q + 1 keys 1 / (q + 1): the raw sum is H_n − H_i, the mean divides it
    by the n − i rows that saw the token, and lift is 1.
    """
    rows = torch.arange(1, length + 1, dtype=torch.float64)
    raw = rows.reciprocal().flip(0).cumsum(0).flip(0)
    mean = raw / (length - torch.arange(length))
    lines = {"raw": raw, "mean": mean, "lift": torch.ones(length)}
    return {
        name: [round(float(x), 5) for x in line[:: length // 40]] for name, line in lines.items()
    }


def draw(content: dict[str, Any]) -> None:
    """Where the kept tokens lie, on uniform and on real attention."""
    plt = pyplot(plain=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, line in content["cells"]["uniform attention"].items():
        places = [i / len(line) for i in range(len(line))]
        scaled = [value / (sum(line) / len(line)) for value in line]
        left.plot(places, scaled, label=name)
    left.set(
        title="Uniform attention: score of each token",
        xlabel="place in the prompt (0 = first token)",
        ylabel="score, mean = 1",
        yscale="log",
    )
    left.legend()
    kept = content["cells"]["kept positions at 1/8"]
    places = [(i + 0.5) / BINS for i in range(BINS)]
    for name in ("raw", "mean", "lift", "lift, last 32 rows"):
        right.plot(places, [share * BINS for share in kept[name]], marker="o", ms=3, label=name)
    right.axhline(1.0, color="grey", lw=0.8, ls=":")
    right.set(
        title="The shipped model at 1/8: tokens kept by score",
        xlabel="place in the prompt (0 = first token)",
        ylabel="density, 1 = evenly spread",
        ylim=(0, None),
    )
    right.legend()
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "heavy-hitters.png", dpi=110)


def table(cells: dict[str, Any]) -> str:
    """Markdown: one row per byte ratio and way."""
    lines = [
        "| bytes | ranked by | hidden | visible | hidden − lift | visible − lift | "
        "nats per answer token | nats − lift | KL on text | KL − lift | held-out recovery |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = cells["full cache"]
    lines.append(
        f"| 1 | full cache | {percent(full, 'hidden')} | {percent(full, 'visible')} | | | "
        f"{summary(full, 'answer_nats')[0]:.2f} | | 0 | | 1 |"
    )
    for number, share in enumerate(RATIOS):
        base = cells[f"1/{share} lift"]
        for scorer, rows in ways(share):
            name = label(scorer, rows)
            cell = cells[f"1/{share} {name}"]
            reached = cells["recovery"][name]["recovery"][number]
            lines.append(
                f"| {cell['kv_ratio']:.3f} | {name} | {percent(cell, 'hidden')} | "
                f"{percent(cell, 'visible')} | {gap(cell, base, 'hidden', 100)} | "
                f"{gap(cell, base, 'visible', 100)} | {summary(cell, 'answer_nats')[0]:.2f} | "
                f"{gap(cell, base, 'answer_nats')} | {summary(cell, 'kl_nats')[0]:.3f} | "
                f"{gap(cell, base, 'kl_nats', digits=3)} | {reached:.3f} |"
            )
    return "\n".join(lines)


def depth_table(cells: dict[str, Any]) -> str:
    """Markdown: recall by the fifth of the document in which the note stood, first to last."""
    rows = []
    for share in RATIOS[:2]:
        for scorer, voters in WAYS:
            cell = cells[f"1/{share} {label(scorer, voters)}"]
            row = [f"{cell['kv_ratio']:.3f}", label(scorer, voters)]
            for name in ("hidden", "visible"):
                row.append(" / ".join(f"{100 * x:.0f}" for x in cell[f"{name}_by_depth"]) + " %")
            rows.append(row)
    shown = [f"{name}, first fifth to last" for name in ("hidden", "visible")]
    return markdown(["bytes", "ranked by", *shown], rows, tight=True)


def main() -> None:
    arguments = parser_of(__doc__, RESULTS / "heavy_hitters.json", 96).parse_args()
    model, tokenizer, suite = setting(arguments.samples)
    shape = shape_of(model.config, model.dtype)
    done = Book(arguments.json, conditions(arguments.samples))
    done.get("uniform attention", lambda: uniform_attention(CONTEXT))
    done.get("kept positions at 1/8", lambda: histogram(model, tokenizer, shape))
    done.get("recovery", lambda: recovery(model, tokenizer, shape))
    full = measure(model, tokenizer, suite)
    done.get("full cache", lambda: quality(model, tokenizer, suite, None, None, full))
    for share in RATIOS:
        for scorer, rows in ways(share):
            plan = plan_for(shape, share, scorer, rows)
            done.get(
                f"1/{share} {label(scorer, rows)}",
                lambda plan=plan: quality(model, tokenizer, suite, plan, None, full),
            )
    draw(done.content)
    print(table(done.cells), depth_table(done.cells), sep="\n\n")


if __name__ == "__main__":
    main()
