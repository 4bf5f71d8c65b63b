"""Tokens per second within a fixed number of KV bytes: every cache takes its largest batch.

    python benchmarks/fixed_memory.py                      # 256 MiB of KV, 2048 tokens per row

Each method's batch is the largest whose keys and values, metadata included, fit the bytes at full
length. Decode steps are timed near that length on synthetic caches; a prompt is timed for one row
and counted once per row. A second cell gives every method the batch of the best StaticCache, which
separates what the batch brings from what the cache does. Writes
benchmarks/results/speed/fixed_memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from speed import text
from speed.cases import own_name
from speed.harness import Asked, Benchmark, Cases, pythons_of, rival_options
from speed.model import COMPILED, INT8, Models, kernels_missing
from speed.plans import PLANNED, Chosen, Setup, plan_for, setups
from speed.text import best, mark, mib, ms, sections, times
from speed.workers import Pythons, quantized_entry

from kvcompress.accounting import kv_bytes
from kvcompress.bench.cell import Rounds
from kvcompress.bench.entries import (
    Entry,
    Holder,
    Ready,
    Size,
    compressed_holder,
    dynamic_holder,
    entry_of,
    prompt_timing,
    quantized_holder,
    static_holder,
)
from kvcompress.bench.result import Cell, Kind, Missing, Result, Row
from kvcompress.bench.run import GQA_DETAIL
from kvcompress.evaluate.serving import model_shape
from kvcompress.measure.caches import kv_sizes
from kvcompress.measure.stats import Spread, spread

LARGEST, EQUAL = "the largest batch that fits", "the same batch for all"
STATIC = "StaticCache bfloat16"
STATIC_COMPILED = f"StaticCache {COMPILED}"
FIFTH = Setup("int8", "int8", 0.2)
SETUPS = (*setups((("int8", "int8"), ("int4", "int4"), ("model", "model"))), PLANNED)
NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Method:
    """A way to hold a cache, whose bytes are known before it is made.

    Attributes:
        row_bytes: of a batch of so many rows at full length.
        weights: format of the model's weights.
    """

    name: str
    kind: Kind
    weights: str
    holder: Holder
    row_bytes: Callable[[int], int]
    quality: str | None = None
    detail: str = ""


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=int, default=256, help="MiB of keys and values")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each row in the end")
    parser.add_argument("--prompts", type=int, default=3, help="timed prompts of each method")
    parser.add_argument("--most-rows", type=int, default=128, help="largest batch")
    rival_options(parser)


def cells(args: argparse.Namespace, models: Models, rounds: Rounds) -> Asked:
    methods, missing = all_methods(models, args.context)
    budget = args.memory * 2**20
    alike = batch_of(next(m for m in methods if m.name == STATIC), budget, args.most_rows)

    def cases(fixed: int | None) -> Cases:
        made, left = entries(models, methods, args, rounds, budget, fixed), list(missing)
        if not args.no_rivals and fixed is None:
            made += _quanto(models, pythons_of(args), args, rounds, budget, left)
        return made, left

    return {LARGEST: partial(cases, None), EQUAL: partial(cases, alike)}


def all_methods(models: Models, context: int) -> tuple[list[Method], list[Missing]]:
    """bfloat16 weights throughout, as a server would have, and ours with int8 weights beside."""
    model = models("bfloat16")
    config = model.config
    layers, heads, dim = kv_sizes(config)
    elements = 2 * layers * heads * dim * context
    made = [
        Method("DynamicCache bfloat16", "artefact", "bfloat16", dynamic_holder(config),
               lambda rows: 2 * elements * rows, detail=GQA_DETAIL),
        Method(STATIC, "peer", "bfloat16", static_holder(config), lambda rows: 2 * elements * rows),
        Method("QuantizedCache fp8 bfloat16", "peer", "bfloat16",
               quantized_holder(config, "fp8", None), lambda rows: elements * rows),
    ]  # fmt: skip
    for setup in SETUPS:
        made.append(_own(model, setup, "bfloat16", context))
    reason = kernels_missing(INT8)
    served = ((FIFTH, COMPILED), (PLANNED, COMPILED), (FIFTH, INT8))
    if reason is not None:
        return made, [Missing(name=own_name(*pair), reason=reason) for pair in served]
    made.append(
        Method(STATIC_COMPILED, "peer", COMPILED, static_holder(config),
               lambda rows: 2 * elements * rows)
    )  # fmt: skip
    return [*made, *(_own(models(weights), each, weights, context) for each, weights in served)], []


def _own(model: Any, setup: Chosen, weights: str, context: int) -> Method:
    plan = plan_for(model_shape(model), setup)
    return Method(
        own_name(setup, weights), "ours", weights, compressed_holder(model, plan),
        lambda rows: kv_bytes(plan, context, rows), quality=setup.name,
    )  # fmt: skip


def batch_of(method: Method, budget_bytes: int, most: int) -> int:
    """The largest batch within the budget; 0 where not even one row fits."""
    return max((n for n in range(1, most + 1) if method.row_bytes(n) <= budget_bytes), default=0)


def entries(
    models: Models,
    methods: Sequence[Method],
    args: argparse.Namespace,
    rounds: Rounds,
    budget: int,
    fixed: int | None,
) -> list[Entry]:
    """Every method that fits, at its own batch or at `fixed`."""
    made = []
    for method in methods:
        batch = fixed or batch_of(method, budget, args.most_rows)
        if not batch:
            continue
        size = size_of(args, rounds, batch)
        entry = entry_of(
            method.name, method.kind, models(method.weights), method.holder, size,
            weights=method.weights, quality=method.quality, detail=method.detail,
            needs_bytes=2 * method.row_bytes(batch),
        )  # fmt: skip
        if fixed is None:
            entry = _with_prompt(entry, models(method.weights), method.holder, args)
        made.append(entry)
    return made


def size_of(args: argparse.Namespace, rounds: Rounds, batch: int) -> Size:
    """So that the last step is at full length."""
    start_at = args.context - rounds.room_tokens
    if start_at < 1:
        raise ValueError(f"--context {args.context}: {rounds.room_tokens} steps do not fit")
    return Size(start_at, batch, rounds.room_tokens, max(args.threads))


def _with_prompt(entry: Entry, model: Any, holder: Holder, args: argparse.Namespace) -> Entry:
    """The entry, with the prompt of one row timed when it is set up."""
    prompt = max(1, args.context - NEW_TOKENS)

    def make() -> Ready:
        one = Size(prompt, 1, NEW_TOKENS, max(args.threads), "prompt")
        timing = prompt_timing(model, holder, one, args.prompts)
        ready = entry.make()
        facts = ready.facts.model_copy(update={"prompt": timing})
        return replace(ready, facts=facts)

    return replace(entry, make=make)


def _quanto(
    models: Models,
    pythons: Pythons,
    args: argparse.Namespace,
    rounds: Rounds,
    budget: int,
    missing: list[Missing],
) -> list[Entry]:
    """QuantizedCache quanto int4, whose bytes one row tells."""
    name = "QuantizedCache quanto int4"
    if not Path(pythons.quant).exists():
        missing.append(Missing(name=name, reason="there is no .venv-quant: see the Makefile"))
        return []
    one = size_of(args, rounds, 1)
    full = replace(one, context_tokens=args.context)
    probe = quantized_entry(models, pythons, "quanto", 4, full, "bfloat16").make()
    probe.close()
    batch = min(args.most_rows, budget // probe.facts.kv_bytes)
    size = size_of(args, rounds, batch)
    return [quantized_entry(models, pythons, "quanto", 4, size, "bfloat16")]


def report(result: Result) -> str:
    return "\n\n".join([*sections(result.cells, table), "## Asked\n\n" + asked(result)])


def table(cell: Cell, quality: Callable[[str | None], str] | None = None) -> str:
    """One row per method.

    Args:
        quality: words for a plan, None for no such column.
    """
    static = cell.row(STATIC)
    headings = [
        "cache, weights", "batch", "KV MiB", "ms per step [quartiles]", "tokens/s decoding",
        f"of {STATIC}", "tokens/s with prompts", f"of {STATIC}", "cpu/wall",
        *([] if quality is None else ["quality of the plan"]),
    ]  # fmt: skip
    rows = []
    for row in cell.rows:
        gains = ["", ""]
        if static is not None and row is not static:
            gains = [_gain(row, static, decoding), _gain(row, static, served)]
        shown = served(row)
        rows.append(
            [
                row.name + mark(row), str(row.batch), mib(row.kv_bytes), ms(row.timing),
                f"{decoding(row).median:.1f}", gains[0],
                "" if shown is None else f"{shown.median:.1f}", gains[1],
                f"{row.timing.cpu_per_wall:.2f}",
                *([] if quality is None else [quality(row.quality)]),
            ]
        )  # fmt: skip
    return text.table(headings, rows)


def rates(row: Row) -> list[float]:
    """Tokens per second of decode steps alone, a figure per round."""
    return [1e3 * row.batch / x for x in row.timing.wall_ms]


def decoding(row: Row) -> Spread:
    return spread(rates(row))


def served_rates(row: Row) -> list[float] | None:
    """Tokens per second where each row's prompt is read first and `NEW_TOKENS` follow."""
    if row.prompt is None:
        return None
    prompts = row.batch * row.prompt.wall.median
    total = row.batch * NEW_TOKENS
    return [1e3 * total / (prompts + NEW_TOKENS * x) for x in row.timing.wall_ms]


def served(row: Row) -> Spread | None:
    found = served_rates(row)
    return None if found is None else spread(found)


def _gain(row: Row, other: Row, rate: Callable[[Row], Spread | None]) -> str:
    mine, theirs = rate(row), rate(other)
    if mine is None or theirs is None:
        return ""
    return f"{mine.median / theirs.median:.2f}x"


def asked(result: Result) -> str:
    """int8 at a fifth of the tokens against StaticCache, decoding and with prompts."""
    lines = []
    largest = result.cell(LARGEST)
    if largest is not None:
        for weights in ("bfloat16", COMPILED):
            for chosen in (FIFTH, PLANNED):
                lines += _against_static(largest, own_name(chosen, weights), STATIC)
        lines += _against_static(largest, own_name(FIFTH, COMPILED), STATIC_COMPILED)
        lines += _against_static(largest, own_name(FIFTH, INT8), STATIC)
    equal = result.cell(EQUAL)
    mine = None if equal is None else best(equal, [own_name(FIFTH, "bfloat16")])
    other = None if equal is None else equal.row(STATIC)
    if mine is not None and other is not None:
        pairs = zip(rates(mine), rates(other), strict=True)
        found = times(spread([a / b for a, b in pairs]))
        lines.append([EQUAL, f"{mine.name} against {STATIC}, decoding", f"{found} at {mine.batch}"])
    return text.answers(lines)


def _against_static(cell: Cell, name: str, rival: str) -> list[list[str]]:
    mine, other = cell.row(name), cell.row(rival)
    if mine is None or other is None:
        return [[cell.name, f"{name} against {rival}", "not measured"]]
    lines = []
    for words, rate in (("decoding", rates), ("with prompts", served_rates)):
        ours, theirs = rate(mine), rate(other)
        if ours is None or theirs is None:
            lines.append([cell.name, f"{name} against {rival}, {words}", "not measured"])
            continue
        found = times(spread([a / b for a, b in zip(ours, theirs, strict=True)]))
        answer = (
            f"{found}: {spread(ours).median:.1f} tokens/s at batch {mine.batch}, "
            f"{spread(theirs).median:.1f} at {other.batch}"
        )
        lines.append([cell.name, f"{name} against {rival}, {words}", answer])
    return lines


RUN = Benchmark("fixed_memory", __doc__, 5, 3, [LARGEST, EQUAL], cells, report, more)
if __name__ == "__main__":
    RUN.main()
