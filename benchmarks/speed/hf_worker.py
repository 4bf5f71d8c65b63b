"""Decode steps on a cache of transformers, in whatever environment runs this.

    PYTHON benchmarks/speed/hf_worker.py --cache quanto --bits 4 --context 4096

For rivals that need packages, a transformers or an allocator of their own. Needs torch and
transformers; see `protocol` for how it is told to take its turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from transformers import DynamicCache

from kvcompress.measure import caches
from kvcompress.measure.timing import stopwatch
from kvcompress.runtime.names import as_argument
from speed.model import NAMES, Models
from speed.protocol import Record, Replies, serve

CACHES = ("dynamic", "static", "fp8", "quanto", "hqq", "kvpress")
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq", "kvpress": "kvpress"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", choices=CACHES, required=True)
    parser.add_argument("--press", default="SnapKV", help="for kvpress: SnapKV or AdaKV")
    parser.add_argument("--keep", type=float, default=0.2, help="for kvpress: share that stays")
    parser.add_argument("--bits", type=int, help="for quanto and hqq")
    parser.add_argument("--weights", choices=NAMES, default="float32")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--room", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reads", action="store_true", help="time prompts, not decode steps")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    args = parser.parse_args()
    replies = Replies()
    torch.set_num_threads(args.threads)
    model = Models(args.scale)(args.weights)
    prompt: Record | None = None
    read: Callable[[], Any] | None = None
    if args.cache == "kvpress":
        read, kept = pressed(model, args), []
        prompt = asdict(stopwatch(lambda: kept.append(read()), 1))
        (cache,) = kept
    else:
        cache = filled(model.config, args)
    held = caches.storage_bytes(cache.layers)
    facts = {"kv_bytes": held, "prompt": prompt, "versions": versions(args.cache)}
    if args.reads:
        serve(replies, facts, lambda steps: asdict(stopwatch(read, steps)))
        return
    token = torch.full((args.batch, 1), 3)
    seen = args.context  # a press makes the cache's own count of tokens too small

    @torch.inference_mode()
    def step() -> None:
        nonlocal seen
        given = {} if prompt is None else {"position_ids": torch.full((args.batch, 1), seen)}
        seen += 1
        model(token, **as_argument(cache), use_cache=True, logits_to_keep=1, **given)

    step()

    def window(steps: int) -> Record:
        step()
        return asdict(stopwatch(step, steps))

    serve(replies, facts, window)


def filled(config: Any, args: argparse.Namespace) -> Any:
    """A cache of random keys and values."""
    _, heads, dim = caches.kv_sizes(config)
    pair = caches.random_pair(args.batch, heads, args.context, dim, NAMES[args.weights])
    with torch.no_grad():
        if args.cache == "dynamic":
            return caches.dynamic(config, pair)
        if args.cache == "static":
            return caches.static(config, pair, args.room)
        return caches.quantized(config, pair, args.cache, args.bits)


def pressed(model: Any, args: argparse.Namespace) -> Callable[[], Any]:
    """Reads a prompt of random tokens and gives what a press of kvpress leaves of it."""
    import kvpress

    inner = kvpress.SnapKVPress(1 - args.keep)
    press = kvpress.AdaKVPress(inner) if args.press == "AdaKV" else inner
    generator = torch.Generator().manual_seed(2)
    shape = (args.batch, args.context)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)

    @torch.inference_mode()
    def read() -> Any:
        cache = DynamicCache()
        with press(model):
            model(ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
        return cache

    return read


def versions(cache: str) -> dict[str, str]:
    """Of transformers, and of what it needs for this cache."""
    names = ["transformers", *([PACKAGES[cache]] if cache in PACKAGES else [])]
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
