"""The situations of this folder on kvpress; run it in kvpress's own environment.

    .venv-kvpress/bin/python benchmarks/peers/run_kvpress.py
    .venv-kvpress/bin/python benchmarks/peers/run_kvpress.py --only families --only offline
    .venv-kvpress-new/bin/python benchmarks/peers/run_kvpress.py --only versions

kvpress is used as its own pipeline uses it: the press is active during the prompt only, the cache
is a plain DynamicCache, one row has no attention mask, and position_ids are passed by hand.
"""

from __future__ import annotations

from importlib.metadata import version

import common
import kvpress_cache
import kvpress_models

SITUATIONS = {
    "storage": kvpress_cache.storage,
    "per_layer": kvpress_cache.per_layer,
    "padding": kvpress_cache.padding,
    "chunked": kvpress_cache.chunked,
    "second_turn": kvpress_cache.second_turn,
    "long_generation": kvpress_cache.long_generation,
    "interleaved": kvpress_cache.interleaved,
    "intact": kvpress_cache.intact,
    "reuse": kvpress_cache.reuse,
    "save_load": kvpress_cache.save_load,
    "quantized_cache": kvpress_models.quantized_cache,
    "quantized_weights": kvpress_models.quantized_weights,
    "eager": kvpress_models.eager,
    "families": kvpress_models.families,
    "positions": kvpress_models.positions,
    "offline": kvpress_models.offline,
    "versions": kvpress_models.versions,
}

if __name__ == "__main__":
    common.main("kvpress", version("kvpress"), SITUATIONS)
