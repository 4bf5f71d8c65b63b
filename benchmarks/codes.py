"""What each code of keys and values costs on a real model: KL, agreement, answers and bits.

    python benchmarks/codes.py --model DIR --model DIR     # results/codes/*.json
    python benchmarks/codes.py --page                      # docs/codes.md

Every head keeps every token, in one code for keys and one for values, with key constants from a
uniform profile; nothing is evicted, so all that is lost is lost by the code. Bits are those of the
cache's own tensors, scales and positions included. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from studies import RESULTS, ROOT, Record, stated

from kvcompress.cli.progress import progress
from kvcompress.evaluate.drawing import Sizes, WorkloadSuite
from kvcompress.evaluate.workloads import KNOWN, make_workloads
from kvcompress.evaluate.workloads_run import reference_logits, run_workload
from kvcompress.measure import machine
from kvcompress.measure.cells import Book
from kvcompress.plan import HeadPlan, uniform
from kvcompress.profile.run import run
from kvcompress.profile.source import load_source, weights_hash
from kvcompress.recipe import Calibration, Recipe, UniformPolicy
from kvcompress.runtime.model.families import shape_of

FOLDER: Final = RESULTS / "codes"
PAGE: Final = ROOT / "docs" / "codes.md"
RUNS: Final = ROOT / "runs" / "codes"
PARTS: Final = 100
PAIRS: Final = (
    *("model/model", "int8/int8", "fp8/fp8", "int8/int4", "int8/rot4", "int4/int4", "rot4/rot4"),
    *("rot4/rot3", "rot4/rot2", "rot3/rot4", "rot3/rot3", "rot3/rot2", "rot2/rot2"),
)


def measure(arguments: argparse.Namespace, directory: str) -> None:
    """Every cell of one model, into results/codes/NAME.json."""
    name = Path(directory).resolve().name
    model, tokenizer = load_source(directory, arguments.device, dtype="float32")
    shape = shape_of(model.config, model.dtype)
    said = stated(
        model_file=weights_hash(model)[:16],
        processor=machine.cpu_words(),
        dtype="float32; bytes are those of 16 bits",
        samples=arguments.samples,
        windows=arguments.windows,
    )
    book = Book(arguments.results / f"{name}.json", {**said, "model": name})

    @cache
    def suite(workload: str, context: int) -> tuple[WorkloadSuite, torch.Tensor | None]:
        sizes = Sizes(context, shape.max_position, windows=arguments.windows)
        (drawn,) = make_workloads(tokenizer, sizes, names=(workload,), samples=arguments.samples)
        return drawn, reference_logits(model, tokenizer, drawn)

    @cache
    def params() -> Any:
        head = HeadPlan(full=True)
        recipe = Recipe(
            name="constants",
            policy=UniformPolicy(kind="uniform", head=head),
            calibration=Calibration(prompts=4),
        )
        where = arguments.runs / name
        with progress(f"{name}: key constants", PARTS) as told:
            steps = lambda done, total: told(PARTS * done // total)  # noqa: E731
            return run(model, tokenizer, recipe, where, steps).load_params(where)

    def cell(workload: str, context: int, pair: str) -> Record:
        drawn, logits = suite(workload, context)
        k, v = pair.split("/")
        plan = uniform(shape, HeadPlan(full=True, k_dtype=k, v_dtype=v))  # type: ignore[arg-type]
        done = run_workload(model, tokenizer, drawn, plan, params(), reference=logits)
        return {
            "kv_bytes": done.kv_bytes,
            "kv_bytes_bf16": done.kv_bytes_bf16,
            "kl_nats": None if done.kl_nats is None else [round(x, 6) for x in done.kl_nats],
            "flips": done.flips,
            "hits": "".join(str(int(hit == 1)) for hit in done.hits) if drawn.samples else None,
            "answer_nats": [round(x, 4) for x in done.answer_nats or ()],
        }

    for workload in arguments.workloads:
        for context in arguments.contexts if KNOWN[workload].text else arguments.contexts[:1]:
            for pair in arguments.codes:
                found = book.get(
                    f"{workload}|{context}|{pair}", partial(cell, workload, context, pair)
                )
                kl = found["kl_nats"] and sum(found["kl_nats"]) / len(found["kl_nats"])
                bits = 16 * found["kv_bytes"] / found["kv_bytes_bf16"]
                print(
                    f"{name} {workload} {context} {pair:12s} {bits:6.3f} bits  KL {kl}", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", default=[], help="directory; several times")
    parser.add_argument("--codes", type=lambda s: s.split(","), default=list(PAIRS), help="K/V,…")
    parser.add_argument("--workloads", type=lambda s: s.split(","), default=["prose", "code"])
    parser.add_argument(
        "--contexts", type=lambda s: [int(x) for x in s.split(",")], default=[2048], help="tokens"
    )
    parser.add_argument("--samples", type=int, default=24, help="questions a workload")
    parser.add_argument("--windows", type=int, default=4, help="of text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--runs", type=Path, default=RUNS)
    arguments = parser.parse_args()
    for model in arguments.model:
        measure(arguments, model)


if __name__ == "__main__":
    main()
