"""What a way to code vectors says of itself, and what coded vectors are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.storage import Storage

HALF_MAX: Final = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Codes:
    """Stored form of vectors ``[..., D]``.

    Attributes:
        data: ``[..., row]``, see `Code.row`; uint8, float8_e4m3fn or the model's dtype.
        scale: ``[..., groups]`` float16, None for ``model``.
        minimum: ``[..., groups]`` float16, None where codes do not lie above one.
    """

    data: Tensor
    scale: Tensor | None
    minimum: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same codes with each of their tensors changed: data, then scale, then minimum."""
        data = change(self.data)
        scale = None if self.scale is None else change(self.scale)
        return Codes(data, scale, None if self.minimum is None else change(self.minimum))


class Code:
    """A way to code a vector: a turned vector is scale · number (+ minimum), channel by channel.

    This one, ``model``, is the vector itself.

    Attributes:
        storage: what needs no torch to be known of it.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def row(self, head_dim: int) -> int:
        """Elements of `Codes.data` for one vector."""
        return head_dim if self.storage.bits is None else self.storage.row_bytes(head_dim)

    def element(self, model_dtype: torch.dtype) -> torch.dtype:
        """Element type of `Codes.data`."""
        return model_dtype if self.storage.bits is None else torch.uint8

    def encode(self, x: Tensor, groups: int) -> Codes:
        """Codes of vectors ``[..., D]``, which `groups` and the storage's multiple divide."""
        return Codes(x, None, None)

    def parts(self, data: Tensor) -> list[Tensor]:
        """The numbers of stored rows: all channels, or equal runs of channels one after another."""
        return [data]

    def turned(self, x: Tensor) -> Tensor:
        """Vectors as they are coded, by a symmetric orthogonal matrix, which is its own inverse.

        A query of coded keys is turned before it meets them, a sum of coded values after it is
        summed."""
        return x


def half(scale: Tensor) -> Tensor:
    """`scale` as float16, never zero: a constant vector has range 0 and codes 0."""
    return scale.clamp(min=torch.finfo(torch.float16).tiny, max=HALF_MAX).to(torch.float16)
