"""What the plans of the speed benchmarks cost in quality, on the shipped model.

    python benchmarks/speed_quality.py       # benchmarks/results/speed/quality.json, minutes

The same shapes of plan as the benchmarks time: the storage, the share that stays, budgets that
differ by head in the same way. Which head gets which budget is chance here as there, and keys have
no centre and scale. The planned one is what a profile of this model solves for an eighth of the
bytes, with the constants that it measured; its heads are written to benchmarks/speed/planned.json,
which the benchmarks time. Questions are on notes in held-out text; KL is to the full cache, in nats
per token of text behind a compressed prefix.
"""

from __future__ import annotations

from typing import Any

from speed.cases import MAIN, OTHERS
from speed.harness import RESULTS, RUNS
from speed.plans import KEEP_RATIO, PLAN, PLANNED, Planned, plan_of
from studies import CONTEXT, conditions, parser_of, quality, setting, shown, summary

from kvcompress.bundle.read import load_params
from kvcompress.demo.plans import demo_recipe
from kvcompress.evaluate.quality import measure
from kvcompress.measure import machine
from kvcompress.measure.cells import Book
from kvcompress.measure.tables import markdown
from kvcompress.plan import Plan
from kvcompress.profile.run import run as take_profile
from kvcompress.profile.solve import solve
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import BytesPolicy
from kvcompress.runtime.model.families import shape_of

FULL = "full cache"
PROMPTS = 8  # of calibration


def main() -> None:
    args = parser_of(__doc__, RESULTS / "quality.json", 96).parse_args()
    model, tokenizer, suite = setting(args.samples)
    done = Book(args.json, conditions(args.samples))
    done.content.setdefault("date", machine.today())
    full = measure(model, tokenizer, suite)
    done.get(FULL, lambda: quality(model, tokenizer, suite, None, None, full))
    shape = shape_of(model.config, model.dtype)
    for setup in (*MAIN, *OTHERS):
        if isinstance(setup, Planned):
            continue
        plan = plan_of(shape, setup)
        done.get(
            setup.name,
            lambda plan=plan: quality(model, tokenizer, suite, plan, None, full),
        )
    if PLANNED.name not in done.cells:
        plan, params = planned(model, tokenizer)
        PLAN.write_text(plan.to_json(), encoding="utf-8")
        done.get(PLANNED.name, lambda: quality(model, tokenizer, suite, plan, params, full))
    print(table(done.cells))


def planned(model: Any, tokenizer: Any) -> tuple[Plan, KVParams]:
    """The plan that a profile of the shipped model solves, and the key constants it measured."""
    recipe = demo_recipe(CONTEXT, PROMPTS)
    profile = take_profile(model, tokenizer, recipe, RUNS / "profile", also=["losses"])
    policy = BytesPolicy(kind="bytes", keep_ratio=KEEP_RATIO, context=CONTEXT)
    plan = solve(profile, policy, recipe.keep)
    return plan, load_params(RUNS / "profile" / "kv_params.safetensors", plan)


def words(cells: dict[str, Any], name: str | None) -> str:
    """``KL 0.0003, recall 92 % hidden, 92 % visible``, empty where nothing was measured."""
    if name is None or name not in cells:
        return ""
    cell = cells[name]
    hidden, visible = (100 * summary(cell, key)[0] for key in ("hidden", "visible"))
    kl = summary(cell, "kl_nats")[0]
    return f"KL {kl:.4f}, recall {hidden:.0f} % hidden, {visible:.0f} % visible"


def table(cells: dict[str, Any]) -> str:
    """Markdown: one row per plan."""
    rows = []
    for name, cell in cells.items():
        hidden, visible = (
            shown(summary(cell, key), 100, 0, mark=" %") for key in ("hidden", "visible")
        )
        kl = shown(summary(cell, "kl_nats"), 1, 4)
        rows.append([name, f"{cell['kv_ratio']:.3f}", kl, hidden, visible])
    headings = [
        "plan", "KV bytes, of 16 bits", "KL to the full cache, nats [95 %]",
        "recall, question hidden [95 %]", "visible [95 %]",
    ]  # fmt: skip
    return markdown(headings, rows, numbers_from=1)


if __name__ == "__main__":
    main()
