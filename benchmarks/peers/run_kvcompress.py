"""The situations of this folder on kvcompress.

    .venv/bin/python benchmarks/peers/run_kvcompress.py
    .venv/bin/python benchmarks/peers/run_kvcompress.py --only families --only padding

A plan is attached to the model, which is then called with a cache of `kvcompress.new_cache`.
"""

from __future__ import annotations

import common
import kvcompress_cache
import kvcompress_models

import kvcompress

SITUATIONS = {
    "storage": kvcompress_cache.storage,
    "per_layer": kvcompress_cache.per_layer,
    "padding": kvcompress_cache.padding,
    "chunked": kvcompress_cache.chunked,
    "second_turn": kvcompress_cache.second_turn,
    "long_generation": kvcompress_cache.long_generation,
    "interleaved": kvcompress_cache.interleaved,
    "intact": kvcompress_cache.intact,
    "reuse": kvcompress_cache.reuse,
    "save_load": kvcompress_models.save_load,
    "quantized_cache": kvcompress_models.quantized_cache,
    "quantized_weights": kvcompress_models.quantized_weights,
    "eager": kvcompress_models.eager,
    "families": kvcompress_models.families,
    "positions": kvcompress_models.positions,
    "offline": kvcompress_models.offline,
    "versions": kvcompress_models.versions,
}

if __name__ == "__main__":
    common.main("kvcompress", kvcompress.__version__, SITUATIONS)
