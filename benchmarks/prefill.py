"""What reading a prompt costs: the same model beside its own caches, kvpress and vLLM.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --cells 1024x1 --no-rivals

Prompts are random tokens. What a compressed cache adds to the forward itself is ranking, dropping
and encoding what it stores. A scored prompt needs sums of attention too: the usual plan takes the
last 64 rows, others every row, or an estimate of that.
Writes benchmarks/results/speed/prefill.json.
"""

from __future__ import annotations

import argparse
from functools import partial

from speed import text
from speed.cases import Place, own_name, places
from speed.harness import RUNS, Asked, Benchmark, Cases, pythons_of, rival_options
from speed.model import Models
from speed.plans import PLANNED, Chosen, Setup, plan_for
from speed.text import against, mark, mib, ms, sections
from speed.workers import kvpress_entry, vllm_entry

from kvcompress.bench.cell import Rounds
from kvcompress.bench.entries import (
    Entry,
    Size,
    compressed_holder,
    dynamic_holder,
    entry_of,
    static_holder,
)
from kvcompress.bench.result import Cell, Result
from kvcompress.evaluate.serving import model_shape

CELLS = "1024x1,4096x1"
SETUPS: tuple[Chosen, ...] = (Setup("int8", "int8", 1.0), Setup("int8", "int8", 0.2), PLANNED)
# score_rows and score_stride: who votes on what stays
VOTERS = {
    "int8 20 %, every query votes, float32": (None, None),
    "int8 20 %, sums estimated, float32": (64, 32),
}


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", type=places, default=places(CELLS), help="CONTEXTxBATCH, ...")
    rival_options(parser)


def cells(args: argparse.Namespace, models: Models, rounds: Rounds) -> Asked:
    def cases(place: Place) -> Cases:
        size = Size(place.context_tokens, place.batch, 1, max(args.threads), "prompt")
        made = entries(models, size)
        if not args.no_rivals:
            pythons, folder = pythons_of(args), RUNS / f"model-{args.scale}"
            made += [
                kvpress_entry(models, pythons, "SnapKV", size, reads=True),
                kvpress_entry(models, pythons, "AdaKV", size, reads=True),
                vllm_entry(models, pythons, folder, size, reads=True),
            ]
        return made, []

    return {place.name: partial(cases, place) for place in args.cells}


def entries(models: Models, size: Size) -> list[Entry]:
    """Transformers' caches and ours, in both formats of the model."""
    made = []
    for weights in ("float32", "bfloat16"):
        model = models(weights)
        config = model.config
        made += [
            entry_of(
                f"DynamicCache {weights}", "peer", model, dynamic_holder(config), size, reads=True
            ),
            entry_of(
                f"StaticCache {weights}", "peer", model, static_holder(config), size, reads=True
            ),
        ]
        for setup in SETUPS:
            plan = plan_for(model_shape(model), setup)
            made.append(
                entry_of(
                    own_name(setup, weights), "ours", model, compressed_holder(model, plan), size,
                    reads=True, quality=setup.name,
                )
            )  # fmt: skip
    model = models("float32")
    for name, (rows, stride) in VOTERS.items():
        voters = {"score_rows": rows, "score_stride": stride}
        plan = plan_for(model_shape(model), SETUPS[1]).model_copy(update=voters)
        holder = compressed_holder(model, plan)
        made.append(entry_of(name, "ours", model, holder, size, reads=True))
    return made


def report(result: Result) -> str:
    return "\n\n".join(sections(result.cells, table))


def table(cell: Cell) -> str:
    """One row per cache; ratios against the same weights in a DynamicCache."""
    headings = [
        "cache, weights", "KV MiB held after it", "ms per prompt [quartiles]", "tokens/s",
        "DynamicCache, same weights =", "cpu/wall",
    ]  # fmt: skip
    rows = [
        [
            row.name + mark(row), mib(row.kv_bytes), ms(row.timing),
            f"{1e3 * row.batch * row.context_tokens / row.timing.wall.median:.0f}",
            against(row, cell.row(f"DynamicCache {row.weights}")),
            f"{row.timing.cpu_per_wall:.2f}",
        ]
        for row in cell.rows
    ]  # fmt: skip
    return text.table(headings, rows)


ORDER = [place.name for place in places(CELLS)]
# a prompt takes seconds: setting a case up reads one already
RUN = Benchmark("prefill", __doc__, 3, 1, ORDER, cells, report, more, warm_rounds=0)
if __name__ == "__main__":
    RUN.main()
