"""What reading a prompt costs: the same model beside its own caches, kvpress and vLLM.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --cells 1024x1 --no-rivals

Prompts are random tokens. What a compressed cache adds to the forward itself is ranking, dropping
and encoding what it stores; plans whose every query votes attend in float32 tiles of their own.
Writes benchmarks/results/speed/prefill.json.
"""

from __future__ import annotations

import argparse

from decode import mark, remarks
from speed.cases import Place, own_name, places
from speed.model import Models
from speed.output import RUNS, Book, note, parser_of, pythons_of, rival_options, start
from speed.planned import PLANNED, Chosen, plan_for
from speed.text import against, markdown, mib, ms
from speed.workers import kvpress_entry, vllm_entry

from kvcompress.bench.cell import Rounds, run_cell
from kvcompress.bench.entries import (
    Entry,
    Size,
    compressed_holder,
    dynamic_holder,
    prompt_entry,
    static_holder,
)
from kvcompress.bench.plans import Setup
from kvcompress.bench.result import Cell, Result
from kvcompress.evaluate.serving import model_shape

CELLS = "1024x1,4096x1"
SETUPS: tuple[Chosen, ...] = (Setup("int8", "int8", 1.0), Setup("int8", "int8", 0.2), PLANNED)
ALL_VOTE = "int8 20 %, every query votes, float32"


def main() -> None:
    args = start(options())
    print(report(measure(args)))


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3, steps=1)
    parser.add_argument("--cells", type=places, default=places(CELLS), help="CONTEXTxBATCH, ...")
    parser.add_argument("--threads", type=int, default=1)
    rival_options(parser)
    return parser


def measure(args: argparse.Namespace) -> Result:
    """Every cell that was not measured before."""
    models = Models(args.scale)
    # a prompt takes seconds: setting a case up reads one already
    rounds = Rounds(args.rounds, args.steps, warm_rounds=0, buffer_bytes=args.buffer * 2**20)
    book = Book("prefill", args, [place.name for place in places(CELLS)])

    def measured(place: Place) -> Cell:
        size = Size(place.context_tokens, place.batch, 1, args.threads, "prompt")
        made = entries(models, size)
        if not args.no_rivals:
            pythons, folder = pythons_of(args), RUNS / f"model-{args.scale}"
            made += [
                kvpress_entry(models, pythons, "SnapKV", size, reads=True),
                kvpress_entry(models, pythons, "AdaKV", size, reads=True),
                vllm_entry(models, pythons, folder, size, reads=True),
            ]
        return run_cell(place.name, made, rounds, threads=(args.threads,), note=note)

    for place in args.cells:
        book.get(place.name, lambda place=place: measured(place))
    return book.result


def entries(models: Models, size: Size) -> list[Entry]:
    """Transformers' caches and ours, in both formats of the model."""
    made = []
    for weights in ("float32", "bfloat16"):
        model = models(weights)
        config = model.config
        made += [
            prompt_entry(f"DynamicCache {weights}", "peer", model, dynamic_holder(config), size),
            prompt_entry(f"StaticCache {weights}", "peer", model, static_holder(config), size),
        ]
        for setup in SETUPS:
            plan = plan_for(model_shape(model), setup)
            made.append(
                prompt_entry(
                    own_name(setup, weights), "ours", model, compressed_holder(model, plan), size,
                    quality=setup.name,
                )
            )  # fmt: skip
    model = models("float32")
    plan = plan_for(model_shape(model), SETUPS[1]).model_copy(update={"score_rows": None})
    holder = compressed_holder(model, plan)
    made.append(prompt_entry(ALL_VOTE, "ours", model, holder, size))
    return made


def report(result: Result) -> str:
    return "\n\n".join(
        f"## {cell.name}\n\n{table(cell)}\n\n{remarks(cell)}" for cell in result.cells
    )


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
    return markdown(headings, rows)


if __name__ == "__main__":
    main()
