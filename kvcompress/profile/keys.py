"""Moments of a layer's keys before the rotary embedding that the probe found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress.plan import ModelShape
from kvcompress.profile.collect import forward, watching_keys
from kvcompress.quant.keystats import KeyStats
from kvcompress.runtime.model.rotation import LayerRotation, find_rotations

__all__ = ["LayerRotation", "find_rotations", "key_moments"]


def key_moments(
    model: Any, shape: ModelShape, rotations: list[LayerRotation], ids: list[int]
) -> list[KeyStats]:
    """Moments of one prompt's un-rotated keys, per layer."""
    found: dict[int, KeyStats] = {}

    def note(layer: int, key: Tensor) -> None:
        exact = key.double()
        rotation = rotations[layer].rotation
        if rotation is not None:
            position = torch.arange(key.shape[1], device=key.device)
            exact = rotation.turn(exact, position, sign=-1)
        found[layer] = KeyStats.of(exact)

    with watching_keys(model, shape, note):
        forward(model, ids)
    return [found[layer] for layer in range(shape.layers)]
