"""The situations of this folder on one side, each in an environment that has its library.

    .venv/bin/python benchmarks/peers/run.py kvcompress
    .venv/bin/python benchmarks/peers/run.py kvcompress --only families --only padding
    .venv-kvpress/bin/python benchmarks/peers/run.py kvpress
    .venv-kvpress-new/bin/python benchmarks/peers/run.py kvpress --only versions

kvpress is used as its own pipeline uses it: the press is active during the prompt only, the cache
is a plain DynamicCache, one row has no attention mask, and position_ids are passed by hand. A plan
of kvcompress is attached to the model, which is then called with a cache of `new_cache`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import common
from common import Record, Setting
from situations import SHARED

OWN = (
    "storage", "padding", "chunked", "long_generation", "intact", "reuse", "save_load",
    "quantized_cache",
)  # fmt: skip


def situations(library: str) -> dict[str, Callable[[Setting], Record]]:
    """What is measured on a side: by the steps of both, or by its own."""
    side = importlib.import_module(f"{library}_side")
    own = importlib.import_module(f"{library}_own")
    shared = {name: partial(situation, side) for name, situation in SHARED.items()}
    return {name: getattr(own, name) for name in OWN} | shared


if __name__ == "__main__":
    common.main(lambda library: (version(library), situations(library)))
