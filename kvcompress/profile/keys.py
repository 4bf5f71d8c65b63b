"""Which rotary embedding a layer applies, found by probing, and moments of the keys before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor

from kvcompress.plan import ModelShape
from kvcompress.profile.collect import forward, watching_keys
from kvcompress.quant.keystats import Convention, KeyStats, Rotation

PROBE_POSITIONS: Final = (1, 17, 61)
# relative error of a key turned back; 16-bit models round cosines, keys and products
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE: Final = 2e-2


@dataclass(frozen=True)
class LayerRotation:
    """What the probe found for one layer; `note` is for the profile."""

    rotation: Rotation | None
    note: str


def find_rotations(model: Any, shape: ModelShape, token: int) -> list[LayerRotation]:
    """The rotary embedding of each layer.

    A prompt of one token at position p attends to itself alone, so nothing in it depends on p but
    the rotation of its key: k(p) = R(p) k(0). The candidate that turns every probed key back to
    k(0) is the layer's own, whatever the model family calls it.
    """
    candidates = _candidates(model, shape.head_dim)
    if not candidates:
        return [LayerRotation(None, "none: the model has no rotary embedding")] * shape.layers
    positions = [p for p in PROBE_POSITIONS if p < shape.max_position]
    at_zero = _probe(model, shape, token, 0)
    probed = [_probe(model, shape, token, p) for p in positions]
    tolerance = _TOLERANCE.get(model.dtype, _COARSE)
    found = []
    for layer in range(shape.layers):
        moved = torch.stack([keys[layer] for keys in probed], dim=1)  # [Hkv, P, D]
        errors = [_error(c, moved, positions, at_zero[layer]) for c in candidates]
        errors.append(_error(None, moved, positions, at_zero[layer]))
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > tolerance:
            note = f"none: no rotary embedding explains the keys (error {min(errors):.2g})"
            found.append(LayerRotation(None, note))
        elif best == len(candidates):
            found.append(LayerRotation(None, "none: keys do not depend on their position"))
        else:
            rotation = candidates[best]
            turned = 2 * rotation.inv_freq.shape[0]
            found.append(LayerRotation(rotation, f"{rotation.convention}, {turned} channels"))
    return found


def _candidates(model: Any, head_dim: int) -> list[Rotation]:
    """Every distinct frequency buffer of the model, in both conventions."""
    distinct: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or buffer.ndim != 1 or 2 * len(buffer) > head_dim:
            continue
        freq = buffer.detach().cpu().double()
        if not any(freq.shape == f.shape and torch.allclose(freq, f) for f in distinct):
            distinct.append(freq)
    return [Rotation(freq, convention) for freq in distinct for convention in get_args(Convention)]


@torch.inference_mode()
def _probe(model: Any, shape: ModelShape, token: int, position: int) -> dict[int, Tensor]:
    """Keys ``[Hkv, D]`` of each layer for one token at `position`."""
    keys: dict[int, Tensor] = {}

    def note(layer: int, key: Tensor) -> None:
        keys[layer] = key[:, 0].double().cpu()

    ids = torch.tensor([[token]], device=model.device)
    with watching_keys(model, shape, note):
        model.base_model(
            input_ids=ids,
            position_ids=torch.full_like(ids, position),
            use_cache=False,
        )
    return keys


def _error(
    rotation: Rotation | None, moved: Tensor, positions: list[int], at_zero: Tensor
) -> float:
    """Largest relative error over the probed positions."""
    back = moved
    if rotation is not None:
        back = rotation.turn(moved, torch.tensor(positions), sign=-1)
    wrong = (back - at_zero[:, None]).norm(dim=(0, 2))
    return float((wrong / at_zero.norm().clamp(min=1e-30)).max())


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
