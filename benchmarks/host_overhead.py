"""Where a decode step's time goes that no kernel uses: Python, and small tensor operations.

    python benchmarks/host_overhead.py

A step of the 222 M model with a cache of next to nothing, timed by part: products with weights,
attention in the compiled kernels, what else kvcompress does around it, and the rest, which is
transformers' own (norms, rotary embeddings, module calls, masks). Each part is the median over
steps of the time inside it; the timers themselves cost about a microsecond per call. Writes
benchmarks/results/speed/host_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from speed.harness import note, numbers, parser_of, start
from speed.model import COMPILED, INT8, Models, words
from speed.plans import Setup, plan_of
from speed.text import table
from torch import nn

from kvcompress.atomic import write_file
from kvcompress.bench.compressed import fill_compressed
from kvcompress.bench.run import conditions
from kvcompress.evaluate.serving import model_shape
from kvcompress.kernels.cpu.library import Library, library
from kvcompress.kernels.linear.bits16 import Linear16
from kvcompress.kernels.linear.int8 import Int8Linear
from kvcompress.measure import machine
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.names import as_argument

CONTEXT: Final = 48  # tokens: the fewest that fill the exact slots and leave codes
WEIGHTS: Final = ("float32", COMPILED, INT8)
PARTS: Final = ("products with weights", "attention kernel", "kvcompress around it", "transformers")


class Clock:
    """Time spent inside named parts; a part inside another is taken off the outer one."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - begin
                self.spent[part] += elapsed - self._inside.pop()
                if self._inside:
                    self._inside[-1] += elapsed

        return timed

    def step(self, forward: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of one step by part."""
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.around("transformers", forward)()
        return {part: 1e3 * seconds for part, seconds in self.spent.items()}


@contextmanager
def timed_parts(clock: Clock) -> Iterator[None]:
    """Every call of a part goes through the clock."""
    with ExitStack() as stack:
        for owner, name, part in (
            (Library, "decode", "attention kernel"),
            (CompressedLayer, "update", "kvcompress around it"),
            (CompressedLayer, "forward", "kvcompress around it"),
            (CompressedCache, "note_forward", "kvcompress around it"),
            (nn.Linear, "forward", "products with weights"),
            (Int8Linear, "forward", "products with weights"),
            (Linear16, "forward", "products with weights"),
        ):
            stack.enter_context(patch.object(owner, name, clock.around(part, getattr(owner, name))))
        yield


@torch.no_grad()
def parts_of(models: Models, weights: str, steps: int) -> dict[str, Any]:
    """Median milliseconds of a step's parts, in the order of `PARTS`, and of the whole."""
    model = models(weights)
    plan = plan_of(model_shape(model), Setup("int8", "int8", 1.0))
    attach(model, plan)
    try:
        config = model.config
        shape = (1, config.num_key_value_heads, CONTEXT, config.head_dim)
        dtype = torch.float32 if weights == INT8 else model.dtype
        cache = fill_compressed(plan, None, (torch.randn(shape).to(dtype),) * 2)
        token = torch.zeros(1, 1, dtype=torch.int64)

        def forward() -> None:
            model(input_ids=token, **as_argument(cache), use_cache=True)

        for _ in range(5):
            forward()
        clock = Clock()
        with timed_parts(clock):
            rows = [clock.step(forward) for _ in range(steps)]
    finally:
        detach(model)
    parts = {part: round(statistics.median(row[part] for row in rows), 3) for part in PARTS}
    whole = round(statistics.median(sum(row.values()) for row in rows), 3)
    layers = config.num_hidden_layers
    return {"weights": weights, "layers": layers, "steps": steps, "ms": parts, "step_ms": whole}


def report(result: dict[str, Any]) -> str:
    """The table, as the page shows it."""
    rows = [
        [
            row["weights"],
            *(f"{row['ms'][part]:.2f}" for part in PARTS),
            f"{row['step_ms']:.2f}",
            f"{1e3 * row['ms'][PARTS[2]] / row['layers']:.0f} µs",
        ]
        for row in result["rows"]
    ]
    head = ["weights", *(f"{part}, ms" for part in PARTS), "step, ms", "kvcompress per layer"]
    return table(head, rows)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every format of weights that this installation has."""
    models = Models(args.scale)
    result = {
        "benchmark": "host_overhead",
        "command": "python benchmarks/host_overhead.py",
        "date": machine.today(),
        "conditions": conditions(words(args.scale), "cpu", machine.malloc_words()).model_dump(),
        "threads": max(args.threads),
        "context_tokens": CONTEXT,
        "rows": [],
    }
    for weights in WEIGHTS if library() is not None else ("float32",):
        note(f"{weights} weights")
        result["rows"].append(parts_of(models, weights, args.rounds * args.steps))
    args.results.mkdir(parents=True, exist_ok=True)
    write_file(args.results / "host_overhead.json", json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    args = start(options())
    print(report(measure(args)))


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=20, steps=5)
    parser.add_argument("--threads", type=numbers, default=(1,))
    return parser


if __name__ == "__main__":
    main()
