"""Constants of the key codec, derived from statistics of keys before the rotary embedding.

A key is stored as the codes of (k − centre) / scale. Constants from rotated keys would fit only the
positions that calibration happened to see. So they are derived from the mean m and the variance of
un-rotated keys, for all positions 0 … max_position − 1 at once.

For a rotary pair (j, j') with frequency ω and m read as the complex number m_j + i·m_j':
    centre = m · c,  c = mean over p of exp(iωp)
    scale² = (var_j + var_j') / 2 + |m|² (1 − |c|²) / 2
A large bias goes into the centre where the rotation leaves it in place, and into the scale where
the rotation spreads it over a circle. A pair shares one scale, which commutes with the rotation.

How many positions there are matters: a channel that turns once in 30000 tokens stands still in the
first 2000, where constants for all 32768 positions leave most of its bias in the codes. So a cache
takes constants for the positions that it will use, see `positions_for`, from `KeyMoments`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from kvcompress.plan import ModelShape
from kvcompress.strict import shown

Size = tuple[int, ...]
Convention = Literal["half-split", "interleaved"]
SMALLEST_SCALE: Final = 1e-4  # of the layer's median, for channels that never move
# Bounds of a file's constants. Keys of real models stay within 1e-4 and 1e4, and for any key
# (k − centre) / scale must stay within float32.
SCALES: Final = (2.0**-40, 2.0**40)
LARGEST: Final = 2.0**40
MAX_HIDDEN: Final = 2**17 + 1
_SCORER: Final = "scorer."
_MOMENTS: Final = ("k_mean", "k_partner", "k_spread", "k_frequency")
FEWEST_POSITIONS: Final = 4096


def positions_for(tokens: int, most: int) -> int:
    """Positions that the constants of a cache are for, whose first prompt has so many tokens.

    A power of two with a quarter of room for the answer, and no more than the model has.
    """
    return min(most, max(FEWEST_POSITIONS, 1 << (tokens + tokens // 4 - 1).bit_length()))


@dataclass(frozen=True)
class KeyMoments:
    """What constants for any number of positions are derived from, each ``[Hkv, D]`` float32.

    Attributes:
        mean: of keys before the rotary embedding.
        partner: what turning by a right angle would make of the mean: −m_j' in channel j of a pair
            and m_j in channel j'; 0 where nothing turns.
        spread: variance, the mean of a pair's.
        frequency: radians per position, 0 where nothing turns; the same in every head.
    """

    mean: Tensor
    partner: Tensor
    spread: Tensor
    frequency: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.partner, self.spread, self.frequency

    def each(self, change: Callable[[Tensor], Tensor]) -> KeyMoments:
        """The same moments with each of their tensors changed."""
        return KeyMoments(*map(change, self.tensors()))

    def constants(self, positions: int) -> tuple[Tensor, Tensor]:
        """(centre, scale) ``[Hkv, D]`` for positions 0 to ``positions − 1``."""
        mean, partner = self.mean.double(), self.partner.double()
        turn = mean_turn(self.frequency, positions)
        center = mean * turn.real + partner * turn.imag
        moved = (1 - turn.abs() ** 2).clamp(min=0)
        scale = (self.spread.double() + (mean**2 + partner**2) * moved / 2).sqrt()
        median = float(scale.median())
        scale = scale.clamp(min=SMALLEST_SCALE * median) if median > 0 else torch.ones_like(scale)
        return center.float(), scale.clamp(*SCALES).float()


@dataclass(frozen=True)
class KVParams:
    """Key constants of every layer, each ``[Hkv, D]`` float32.

    Attributes:
        k_center, k_scale: for all positions of the model.
        moments: of every layer, for constants of fewer positions; empty where only these are known.
        scorer: trained tensors of a scorer by name, one for each layer; their first dimension is
            the KV heads.
    """

    k_center: tuple[Tensor, ...]
    k_scale: tuple[Tensor, ...]
    scorer: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    moments: tuple[KeyMoments, ...] = ()

    def constants(self, layer: int, positions: int) -> tuple[Tensor, Tensor]:
        """(centre, scale) ``[Hkv, D]`` of a layer, for positions 0 to ``positions − 1``."""
        if not self.moments:
            return self.k_center[layer], self.k_scale[layer]
        return self.moments[layer].constants(positions)

    def tensors_of(self, layer: int) -> dict[str, Tensor]:
        """The scorer's trained tensors of one layer, by name."""
        return {name: parts[layer] for name, parts in self.scorer.items()}

    def save(self, path: Path | str) -> None:
        """Write a safetensors file with ``layers.{i}.k_center`` and ``layers.{i}.k_scale``,
        ``layers.{i}.k_mean`` and the other moments where they are known, and
        ``layers.{i}.scorer.{name}`` for what was trained."""
        from safetensors.torch import save_file

        tensors = {}
        for i, (center, scale) in enumerate(zip(self.k_center, self.k_scale, strict=True)):
            tensors[f"layers.{i}.k_center"] = center.detach().cpu().float().contiguous()
            tensors[f"layers.{i}.k_scale"] = scale.detach().cpu().float().contiguous()
            more = {f"{_SCORER}{name}": value for name, value in self.tensors_of(i).items()}
            if self.moments:
                more |= dict(zip(_MOMENTS, self.moments[i].tensors(), strict=True))
            for name, value in more.items():
                tensors[f"layers.{i}.{name}"] = value.detach().cpu().float().contiguous()
        save_file(tensors, str(path), metadata={"format": "pt"})

    @staticmethod
    def load(path: Path | str, shape: ModelShape) -> KVParams:
        """Read what `save` wrote for a model of this shape.

        Raises:
            ValueError: for anything else: tensors that are missing or too many, another dtype or
                shape, values that are not finite or out of range.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                kinds = _kinds(names, shape)
                for name in sorted(names):
                    header = file.get_slice(name)
                    for check in HEADER_CHECKS.values():
                        _refuse(check(name, (*header.get_shape(),), header.get_dtype(), shape))
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, OverflowError) as error:
            raise ValueError(f"not a safetensors file ({shown(str(error), 200)})") from None
        for name in sorted(tensors):
            for examine in VALUE_CHECKS.values():
                _refuse(examine(name, tensors[name]))
        parts = {
            kind: tuple(tensors[f"layers.{i}.{kind}"] for i in range(shape.layers))
            for kind in kinds
        }
        scorer = {k.removeprefix(_SCORER): p for k, p in parts.items() if k.startswith(_SCORER)}
        moments: tuple[KeyMoments, ...] = ()
        if _MOMENTS[0] in parts:
            columns = zip(*(parts[name] for name in _MOMENTS), strict=True)
            moments = tuple(KeyMoments(*own) for own in columns)
        return KVParams(parts["k_center"], parts["k_scale"], scorer, moments)


def _kinds(names: set[str], shape: ModelShape) -> list[str]:
    """The names of a layer's tensors, if every layer of the file has the same."""
    first = "layers.0."
    trained = sorted(n.removeprefix(first) for n in names if n.startswith(first + _SCORER))
    moments = _MOMENTS if first + _MOMENTS[0] in names else ()
    kinds = ["k_center", "k_scale", *moments, *trained]
    wanted = {f"layers.{i}.{kind}" for i in range(shape.layers) for kind in kinds}
    odd = sorted(names ^ wanted)
    if odd:
        what = "missing" if odd[0] in wanted else "not one of its tensors"
        raise ValueError(
            f"expected k_center and k_scale of layers 0 to {shape.layers - 1}; "
            f"{shown(odd[0])!r} is {what}"
        )
    return kinds


def _dtype(name: str, size: Size, dtype: str, shape: ModelShape) -> str | None:
    return None if dtype == "F32" else f"{name} is {dtype}, not F32"


def _size(name: str, size: Size, dtype: str, shape: ModelShape) -> str | None:
    want = (shape.kv_heads, shape.head_dim)
    if _SCORER in name or size == want:
        return None
    return f"{name} has shape {size}, the model has {want}: it is another model's"


def _scorer_size(name: str, size: Size, dtype: str, shape: ModelShape) -> str | None:
    if _SCORER not in name:
        return None
    if len(size) == 2 and size[0] == shape.kv_heads and size[1] <= MAX_HIDDEN:
        return None
    return f"{name} has shape {size}, not {shape.kv_heads} heads of one vector"


def _scale(name: str, value: Tensor) -> str | None:
    if name.endswith((".k_spread", ".k_frequency")):
        low, high = (float(end) for end in value.aminmax())
        if 0 <= low and high <= LARGEST:
            return None
        return f"{name} has numbers from {low:g} to {high:g}, expected 0 to {LARGEST:g}"
    if not name.endswith(".k_scale"):
        return None
    low, high = (float(end) for end in value.aminmax())
    if SCALES[0] <= low and high <= SCALES[1]:
        return None
    return f"{name} has scales from {low:g} to {high:g}, expected {SCALES[0]:g} to {SCALES[1]:g}"


def _largest(name: str, value: Tensor) -> str | None:
    if name.endswith(".k_scale") or not value.numel() or float(value.abs().amax()) <= LARGEST:
        return None
    return f"{name} holds NaN, or values beyond {LARGEST:g}"


# By name, so that a test can take one away. The checks of a header run before any tensor is read.
# The checks of values are written so that NaN fails them.
HEADER_CHECKS: Final[dict[str, Callable[[str, Size, str, ModelShape], str | None]]] = {
    "dtype": _dtype,
    "size": _size,
    "size of a scorer": _scorer_size,
}
VALUE_CHECKS: Final[dict[str, Callable[[str, Tensor], str | None]]] = {
    "range of scales": _scale,
    "range of values": _largest,
}


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding of the first ``2 · len(inv_freq)`` channels.

    Attributes:
        inv_freq: ``[rot/2]``, radians per position.
        convention: ``half-split`` turns channels (j, j + rot/2), ``interleaved`` (2j, 2j + 1).
    """

    inv_freq: Tensor
    convention: Convention

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Channel numbers of the first and of the second member of each pair."""
        half = self.inv_freq.shape[0]
        index = torch.arange(half)
        if self.convention == "half-split":
            return index, index + half
        return 2 * index, 2 * index + 1

    def turn(self, key: Tensor, position: Tensor, sign: int = 1) -> Tensor:
        """`key` ``[..., S, D]`` turned by ``sign`` times the angle of `position` ``[S]``.

        In float64 where `key` is: angles of far positions need it.
        """
        angle = position.double()[:, None] * self.inv_freq.to(position.device).double() * sign
        return self.turn_by(key, angle.cos(), angle.sin())

    def turn_by(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`vectors` ``[..., D]``, each pair of channels turned by the angle of this cosine and
        sine, which are broadcastable to ``[..., rot/2]``; a copy."""
        cos, sin = cos.to(vectors.dtype), sin.to(vectors.dtype)
        first, second = (p.to(vectors.device) for p in self.pairs())
        a, b = vectors[..., first], vectors[..., second]
        turned = vectors.clone()
        turned[..., first] = a * cos - b * sin
        turned[..., second] = b * cos + a * sin
        return turned


@dataclass(frozen=True)
class KeyStats:
    """Moments of one layer's un-rotated keys, float64.

    Attributes:
        count: tokens seen.
        mean, var: ``[Hkv, D]``, the population variance.
    """

    count: int
    mean: Tensor
    var: Tensor

    @staticmethod
    def of(key: Tensor) -> KeyStats:
        """From keys ``[Hkv, S, D]``."""
        exact = key.double()
        var, mean = torch.var_mean(exact, dim=1, correction=0)
        return KeyStats(key.shape[1], mean.cpu(), var.cpu())

    def merge(self, other: KeyStats) -> KeyStats:
        """Moments of both samples together (Chan's update, stable for large means)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        spread = self.var * self.count + other.var * other.count
        spread = spread + delta**2 * (self.count * other.count / count)
        return KeyStats(count, mean, spread / count)


def derive(stats: list[KeyStats], rotations: list[Rotation | None], max_position: int) -> KVParams:
    """Constants for positions 0 to ``max_position − 1``, and what those of fewer are made from.

    Args:
        rotations: per layer, None where keys are stored as they leave their projection.
    """
    moments = tuple(map(_moments, stats, rotations))
    constants = [own.constants(max_position) for own in moments]
    return KVParams(tuple(c for c, _ in constants), tuple(s for _, s in constants), {}, moments)


def _moments(stats: KeyStats, rotation: Rotation | None) -> KeyMoments:
    mean, spread = stats.mean.clone(), stats.var.clone()
    partner, frequency = torch.zeros_like(mean), torch.zeros_like(mean)
    if rotation is not None:
        first, second = rotation.pairs()
        partner[:, first], partner[:, second] = -mean[:, second], mean[:, first]
        spread[:, first] = (stats.var[:, first] + stats.var[:, second]) / 2
        spread[:, second] = spread[:, first]
        inv_freq = rotation.inv_freq.detach().cpu().double()
        frequency[:, first], frequency[:, second] = inv_freq, inv_freq
    return KeyMoments(mean.float(), partner.float(), spread.float(), frequency.float())


def mean_turn(inv_freq: Tensor, positions: int) -> Tensor:
    """Mean of exp(iωp) over p = 0 … positions − 1, complex128: a geometric sum in closed form."""
    omega = inv_freq.detach().cpu().double()
    # sin(Nω/2) / (N sin(ω/2)) · exp(iω(N−1)/2), which stays exact where ω is tiny
    half = torch.sin(omega / 2)
    ratio = torch.sin(positions * omega / 2) / (positions * half)
    # where ω is a multiple of 2π every term is 1
    ratio = torch.where(half.abs() < 1e-15, torch.ones_like(ratio), ratio)
    angle = omega * (positions - 1) / 2
    return torch.complex(ratio * angle.cos(), ratio * angle.sin())
