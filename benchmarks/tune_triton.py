"""Measures the settings of decode_pieces on this GPU and rewrites its part of the committed table.

    python benchmarks/tune_triton.py [--minutes 6] [--out TABLE.json] [--dry]

Every storage at head_dim 64, 128 and 256, over equal segments of 32k tokens at batch 16 and at
batch 1: the setting whose slower case, in bytes per second, is fastest is written. The table is
kvcompress/kernels/tuning.json; `default` is left alone. `--dry` measures references at tiny sizes
on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from gpu import Run, copy_bandwidth, split_inputs

from kvcompress.kernels import tuning
from kvcompress.kernels.tuning import SplitConfig

TABLE = Path(tuning.__file__).with_name("tuning.json")
STORAGES = ("int8", "int4", "fp8", "model")
CASES = ((32768, 16), (32768, 1))


def settings(dry: bool) -> Iterator[SplitConfig]:
    if dry:
        yield SplitConfig(32, 4, 1, 64)
        yield SplitConfig(64, 4, 2, 128)
        return
    for chunk in (1024, 512):
        for tokens, warps in ((64, 4), (128, 8), (128, 4), (32, 4), (64, 8), (32, 2)):
            for stages in (1, 2, 3):
                yield SplitConfig(tokens, warps, stages, chunk)


def slowest(run: Run, storage: str, dim: int, config: SplitConfig) -> float:
    """GB/s of the slower case."""
    if run.dry:
        from kvcompress.kernels.decode_split.reference import decode_pieces

        extra: dict[str, Any] = {}
    else:
        from kvcompress.kernels.decode_split.triton import decode_pieces

        extra = {"config": config}
    rates = []
    for context, batch in [(40, 1)] if run.dry else CASES:
        arguments, read = split_inputs(run, storage, context, batch, dim, config.chunk_tokens)
        ms = run.time_ms(lambda a=arguments: decode_pieces(*a, **extra), 30.0)
        rates.append(read / ms / 1e6)
    return min(rates)


def best(run: Run, storage: str, dim: int, seconds: float) -> tuple[SplitConfig | None, float]:
    """The fastest setting that compiles, of those that the time allows."""
    found, rate, stop = None, 0.0, run.left() - seconds
    for config in settings(run.dry):
        if run.left() < max(stop, 5):
            break
        try:
            reached = slowest(run, storage, dim, config)
        except Exception as error:  # too much shared memory, or registers: not for this device
            print(f"{storage} {dim} {astuple(config)}: {type(error).__name__}", file=sys.stderr)
            continue
        print(f"{storage} {dim} {astuple(config)}: {reached:.1f} GB/s", file=sys.stderr, flush=True)
        if reached > rate:
            found, rate = config, reached
    return found, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="of everything")
    parser.add_argument("--out", type=Path, default=TABLE, help="table to write")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        sys.exit("benchmarks/tune_triton.py: torch sees no CUDA device; --dry tries the script")
    run = Run(args.out.with_suffix(".log.json"), args.minutes, args.dry)
    run.row("copy", 0, lambda: copy_bandwidth(run))
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    arch = "dry" if args.dry else tuning.architecture(torch.device("cuda", 0))
    wanted = [(s, d) for d in ((16,) if args.dry else (128, 64, 256)) for s in STORAGES]
    for number, (storage, dim) in enumerate(wanted):
        config, rate = best(run, storage, dim, run.left() / (len(wanted) - number))
        if config is None:
            continue
        entry = table.setdefault(arch, {}).setdefault(f"{storage}/{storage}", {})
        entry[str(dim)] = list(astuple(config))
        run.row(
            "tune",
            0,
            lambda c=config, r=rate: {
                "config": list(astuple(c)),
                "GB_per_s": r,
                "of_copy": r / run.bandwidth,
            },
            storage=storage,
            dim=dim,
        )
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
