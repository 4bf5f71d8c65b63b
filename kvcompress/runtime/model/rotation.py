"""Finding the rotary embedding of each layer by probing, and turning vectors by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

import torch
from torch import Tensor

from kvcompress.plan import ModelShape
from kvcompress.quant.keystats import Convention, Rotation
from kvcompress.runtime.names import as_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_POSITIONS: Final = (1, 17, 61)
# relative error of a key turned back; 16-bit models round cosines, keys and products
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE: Final = 2e-2


@dataclass(frozen=True)
class LayerRotation:
    """The rotary embedding that the probe found for one layer.

    Attributes:
        note: the finding in words, for the profile and for messages.
        explained: whether the layer's keys are known to be turned by `rotation` and by nothing
            else, or not to depend on their position where it is None.
        silent: whether the probed keys were all zero, so that another token may tell more.
    """

    rotation: Rotation | None
    note: str
    explained: bool = True
    silent: bool = False


def find_rotations(
    model: PreTrainedModel, shape: ModelShape, token: int, last_position: int | None = None
) -> list[LayerRotation]:
    """The rotary embedding of each layer.

    A prompt of one token at position p attends to itself alone, so nothing in it depends on p but
    the rotation of its key: k(p) = R(p) k(0). The candidate that turns every probed key back to
    k(0) is the layer's own, whatever the model family calls it. Keys are read from transformers'
    own cache, which holds them rotated.

    Args:
        token: id of the prompt's token.
        last_position: probed too, where one rotation has to hold up to there; some models
            change theirs beyond a length (arXiv 2402.13753).
    """
    candidates = _candidates(model, shape.head_dim)
    if not candidates:
        nothing = LayerRotation(None, "none: the model has no rotary embedding", explained=False)
        return [nothing] * shape.layers
    positions = [p for p in PROBE_POSITIONS if p < shape.max_position]
    # the farthest first, so that a model that switches its frequencies ends with the usual ones
    positions = [*filter(None, [last_position]), *reversed(positions)]
    probed = [_probe(model, token, p) for p in positions]
    at_zero = _probe(model, token, 0)
    tolerance = _TOLERANCE.get(model.dtype, _COARSE)
    found = []
    for layer in range(shape.layers):
        if layer not in at_zero:
            found.append(LayerRotation(None, "none: the layer holds no keys"))
            continue
        moved = torch.stack([keys[layer] for keys in probed], dim=1)  # [Hkv, P, D]
        found.append(_explain(candidates, moved, positions, at_zero[layer], tolerance))
    return found


def _explain(
    candidates: list[Rotation],
    moved: Tensor,
    positions: list[int],
    at_zero: Tensor,
    tolerance: float,
) -> LayerRotation:
    """The candidate that turns `moved` ``[Hkv, P, D]`` back to `at_zero` ``[Hkv, D]``."""
    if not at_zero.any():
        return LayerRotation(None, "none: the probe's keys are zero", explained=False, silent=True)
    choices: list[Rotation | None] = [*candidates, None]
    errors = [_error(c, moved, positions, at_zero) for c in choices]
    best = min(range(len(errors)), key=errors.__getitem__)
    rotation = choices[best]
    if errors[best] > tolerance:
        note = f"none: no rotary embedding explains the keys (error {errors[best]:.2g})"
        return LayerRotation(None, note, explained=False)
    if rotation is None:
        return LayerRotation(None, "none: keys do not depend on their position")
    return LayerRotation(
        rotation, f"{rotation.convention}, {2 * rotation.inv_freq.shape[0]} channels"
    )


def _candidates(model: PreTrainedModel, head_dim: int) -> list[Rotation]:
    """Every distinct frequency buffer of the model, in both conventions."""
    distinct: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or buffer.ndim != 1 or 2 * len(buffer) > head_dim:
            continue
        freq = buffer.detach().cpu().double()
        if not any(freq.shape == f.shape and torch.allclose(freq, f) for f in distinct):
            distinct.append(freq)
    return [Rotation(freq, convention) for freq in distinct for convention in get_args(Convention)]


@torch.no_grad()
def _probe(model: PreTrainedModel, token: int, position: int) -> dict[int, Tensor]:
    """Keys ``[Hkv, D]`` of each layer that holds some, for one token at `position`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.tensor([[token]], device=model.device)
    model.base_model(
        input_ids=ids,
        position_ids=torch.full_like(ids, position),
        **as_argument(cache),
        use_cache=True,
    )
    held = ((layer, getattr(own, "keys", None)) for layer, own in enumerate(cache.layers))
    return {
        layer: key[0, :, 0].double().cpu()
        for layer, key in held
        if isinstance(key, Tensor) and key.numel()
    }


def _error(
    rotation: Rotation | None, moved: Tensor, positions: list[int], at_zero: Tensor
) -> float:
    """Largest relative error over the probed positions."""
    back = moved
    if rotation is not None:
        back = turn(moved, -angles(rotation, torch.tensor(positions)), rotation)
    wrong = (back - at_zero[:, None]).norm(dim=(0, 2))
    return float((wrong / at_zero.norm()).max())


def angles(rotation: Rotation, position: Tensor) -> Tensor:
    """Angles ``[..., rot/2]`` of integer positions ``[...]`` in radians, float64.

    The product is rounded to float32, as every model does, so that a difference of two angles
    takes back what the model did, however far the position.
    """
    frequency = rotation.inv_freq.to(position.device, torch.float32)
    return (position.float().unsqueeze(-1) * frequency).double()


def turn(vectors: Tensor, angle: Tensor, rotation: Rotation) -> Tensor:
    """`vectors` ``[..., D]`` turned by float64 angles, broadcastable to ``[..., rot/2]``; a copy.

    Whole turns are taken off in float64; sines and products are in the dtype of `vectors`.
    """
    rest = torch.remainder(angle, 2 * math.pi).to(vectors.dtype)
    return rotation.turn_by(vectors, rest.cos(), rest.sin())
