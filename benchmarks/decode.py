"""A decode step of a 222 M model: every recipe beside transformers' caches, kvpress and vLLM.

    python benchmarks/decode.py                                   # all cells, about an hour
    python benchmarks/decode.py --cells 4096x1 --no-rivals        # one cell, no other environments
    python benchmarks/decode.py --cells 4096x1 --only vLLM --only StaticCache --results runs/look

Cases take turns in one process, and rivals that need an environment of their own take theirs in
processes that wait in between. Caches are filled with random keys and values, but where a rival can
only read a prompt. Writes benchmarks/results/speed/decode.json, cell by cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from speed import text
from speed.cases import Place, Rivals, decode_entries, own_name, places
from speed.claims import Claim, answers
from speed.harness import RUNS, Asked, Benchmark, Cases, pythons_of, rival_options
from speed.model import COMPILED, INT8, Models
from speed.plans import PLANNED, Setup
from speed.text import against, best, mark, mib, ms, of_floor, sections, times

from kvcompress.bench.cell import Rounds
from kvcompress.bench.entries import Size
from kvcompress.bench.result import Cell, Result, speedup

CELLS = "1024x1,2048x1,4096x1,16384x1,1024x8"
PROMPT_CELLS = "4096x1,16384x1,1024x8"
STATIC = ("StaticCache float32", "StaticCache bfloat16")
BEST_HF = ("DynamicCache float32", *STATIC, "QuantizedCache fp8 float32")
WHOLE, FIFTH = Setup("int8", "int8", 1.0), Setup("int8", "int8", 0.2)
MODEL_WEIGHTS = ("float32", "bfloat16")


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", type=places, default=places(CELLS), help="CONTEXTxBATCH, ...")
    parser.add_argument(
        "--prompt-cells", type=places, default=places(PROMPT_CELLS),
        help="of these, with rivals that have to read a real prompt (minutes at 16384)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT",
        help="cases whose names contain this; repeatable",
    )  # fmt: skip
    rival_options(parser)


def cells(args: argparse.Namespace, models: Models, rounds: Rounds) -> Asked:
    rivals = None
    if not args.no_rivals:
        folder = RUNS / f"model-{args.scale}"
        rivals = Rivals(pythons_of(args), folder, tuple(args.prompt_cells))

    def cases(place: Place) -> Cases:
        size = Size(place.context_tokens, place.batch, rounds.room_tokens, max(args.threads))
        made, missing = decode_entries(models, place, size, rivals)
        if not args.only:
            return made, missing
        return [e for e in made if any(word in e.name for word in args.only)], []

    return {place.name: partial(cases, place) for place in args.cells}


def report(result: Result) -> str:
    return "\n\n".join([*sections(result.cells, table), "## Asked\n\n" + asked(result)])


def table(cell: Cell, quality: Callable[[str | None], str] | None = None) -> str:
    """One row per case.

    Args:
        quality: words for a plan, None for no such column.
    """
    static, dynamic = best(cell, STATIC), cell.row("DynamicCache float32")
    headings = [
        "cache, weights", "KV MiB", "weights MiB", "ms per token [quartiles]", "tokens/s",
        "best StaticCache =", "DynamicCache =", "floor ms (of it)", "cpu/wall",
        *([] if quality is None else ["quality of the plan"]),
    ]  # fmt: skip
    rows = [
        [
            row.name + mark(row), mib(row.kv_bytes), mib(row.weights_bytes), ms(row.timing),
            f"{1e3 * row.batch / row.timing.wall.median:.1f}",
            against(row, static), against(row, dynamic), of_floor(cell, row),
            f"{row.timing.cpu_per_wall:.2f}",
            *([] if quality is None else [quality(row.quality)]),
        ]
        for row in cell.rows
    ]  # fmt: skip
    return text.table(headings, rows)


def claims() -> list[Claim]:
    """What decode is built to decide."""
    fifth = tuple(own_name(FIFTH, weights) for weights in MODEL_WEIGHTS)
    whole = tuple(own_name(WHOLE, weights) for weights in MODEL_WEIGHTS)
    stack, compiled = own_name(FIFTH, INT8), own_name(FIFTH, COMPILED)
    vllm, no_cache = ("vLLM bfloat16",), tuple(f"no cache to read, {w}" for w in MODEL_WEIGHTS)
    long, middle, rows = (p.name for p in places("16384x1,4096x1,1024x8"))
    planned = tuple(own_name(PLANNED, weights) for weights in MODEL_WEIGHTS)
    found: list[Claim] = []
    for cell in (long, middle):
        found += [
            Claim(cell, "planned 1/8 against the best cache of transformers", planned, BEST_HF),
            Claim(cell, "int8 20 % against the best cache of transformers", fifth, BEST_HF),
            Claim(cell, "int8 20 % against the model with no cache to read", fifth, no_cache),
            Claim(cell, "int8 20 %, compiled bfloat16, against them", (compiled,), BEST_HF),
            Claim(
                cell, "int8 20 %, compiled bfloat16, against StaticCache with these products",
                (compiled,), ("StaticCache compiled bfloat16",),
            ),
            Claim(cell, "int8 20 %, int8 weights, against them", (stack,), BEST_HF),
            Claim(
                cell, "int8 20 %, int8 weights, against StaticCache with int8 weights", (stack,),
                ("StaticCache int8 weights",),
            ),
            Claim(cell, "int8 20 %, int8 weights, against the floor", (stack,)),
        ]  # fmt: skip
    quantized = ("QuantizedCache quanto int4", "QuantizedCache hqq int4")
    found.append(Claim(long, "int8 20 % against QuantizedCache int4", fifth, quantized))
    for cell in (middle, long, rows):
        found.append(Claim(cell, "int8 20 % against vLLM", fifth, vllm))
        found.append(Claim(cell, "planned 1/8 against vLLM", planned, vllm))
        found.append(Claim(cell, "int8 20 %, compiled bfloat16, against vLLM", (compiled,), vllm))
        found.append(Claim(cell, "int8 20 %, int8 weights, against vLLM", (stack,), vllm))
    for place in places("2048x1,4096x1,16384x1"):
        found.append(Claim(place.name, "int8 100 % against the best StaticCache", whole, STATIC))
    return found


def asked(result: Result) -> str:
    """The claims as a table, and whether every recipe beats DynamicCache."""
    lines = [[cell, title, answer] for cell, title, answer in answers(result, claims())]
    for cell in result.cells:
        lines.append([cell.name, "every recipe against DynamicCache float32", worst(cell)])
    return text.answers(lines)


def worst(cell: Cell) -> str:
    """The recipe of ours that gains least on DynamicCache."""
    peer = cell.row("DynamicCache float32")
    own = [row for row in cell.rows if row.kind == "ours"]
    if peer is None or not own:
        return "not measured"
    gains = {row.name: speedup(row.timing, peer.timing) for row in own}
    least = min(gains, key=lambda name: gains[name].median)
    ahead = sum(gain.median > 1 for gain in gains.values())
    return f"{ahead} of {len(own)} are faster; the least, {least}: {times(gains[least])}"


RUN = Benchmark(
    "decode", __doc__, 9, 3, [place.name for place in places(CELLS)], cells, report, more
)
if __name__ == "__main__":
    RUN.main()
