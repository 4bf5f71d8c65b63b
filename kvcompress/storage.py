"""How keys and values may be stored: what needs no torch to be known, each storage once.

`kvcompress.quant.codes` has the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Final, Literal

KVDtype = Literal["model", "fp8", "int8", "int4", "rot4", "rot3", "rot2"]
Coding = Literal["plain", "float", "steps", "levels"]
_HALF_BYTES: Final = 2  # of a scale or a minimum


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store a vector.

    Attributes:
        bits: of a code; None where the vector is stored as it is.
        coding: ``steps`` counts equal steps from a minimum up; ``levels`` numbers the levels of a
            rotated vector; ``float`` codes are numbers of their own.
        short: its part of names such as ``k8v4``.
        meaning: in a glossary.
        value_group: most channels of a value that share a scale; None is all of them.
    """

    bits: int | None
    coding: Coding
    short: str
    meaning: str
    value_group: int | None = None

    @property
    def has_minimum(self) -> bool:
        return self.coding == "steps"

    @property
    def scale_power(self) -> float:
        """Power of a key's static scale that it is divided by: a rotation evens out the rest."""
        return 0.5 if self.coding == "levels" else 1.0

    @property
    def levels(self) -> int:
        """The largest integer code."""
        assert self.bits is not None
        return (1 << self.bits) - 1

    @property
    def multiple(self) -> int:
        """Channels whose codes fill whole bytes: a vector has a multiple of them."""
        return 1 if self.bits is None else lcm(self.bits, 8) // self.bits

    def row_bytes(self, head_dim: int) -> int:
        """The codes of a vector."""
        assert self.bits is not None
        return head_dim * self.bits // 8

    def channels(self, row: int) -> int:
        """Of a vector whose codes take `row` elements."""
        return row if self.bits is None else row * 8 // self.bits

    def vector_bytes(self, head_dim: int, model_dtype_bytes: int, groups: int = 1) -> int:
        """One stored vector with the scales, and minima, of its groups."""
        if self.bits is None:
            return head_dim * model_dtype_bytes
        return self.row_bytes(head_dim) + (1 + self.has_minimum) * _HALF_BYTES * groups

    def value_groups(self, head_dim: int) -> int:
        """Equal parts of a value vector that have a scale each."""
        groups = 1 if self.value_group is None else -(-head_dim // self.value_group)
        while head_dim % groups:
            groups += 1
        return groups

    def holds(self, other: Storage) -> bool:
        """Whether it has at least the bits of `other`; of two kinds, more."""
        if self.bits is None or self == other:
            return True
        return other.bits is not None and other.bits < self.bits


STORAGES: Final[dict[KVDtype, Storage]] = {
    "model": Storage(None, "plain", "16", "the model's own dtype"),
    "int8": Storage(8, "steps", "8", "8 bits for each number"),
    "int4": Storage(4, "steps", "4", "4 bits for each number", value_group=64),
    "fp8": Storage(8, "float", "f8", "8-bit floating point"),
    "rot4": Storage(4, "levels", "r4", "rotated, 4 bits for each number"),
    "rot3": Storage(3, "levels", "r3", "rotated, 3 bits for each number"),
    "rot2": Storage(2, "levels", "r2", "rotated, 2 bits for each number"),
}
# what a byte plan may give keys and values, unless a recipe says otherwise; keys need more bits
PAIRS: Final[tuple[tuple[KVDtype, KVDtype], ...]] = (
    ("int8", "int8"),
    ("int8", "rot4"),
    ("rot4", "rot4"),
    ("rot4", "rot3"),
    ("rot4", "rot2"),
    ("rot3", "rot3"),
    ("rot3", "rot2"),
    ("rot2", "rot2"),
)
