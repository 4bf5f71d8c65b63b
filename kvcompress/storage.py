"""How keys and values may be stored: what needs no torch to be known, each storage once.

`kvcompress.quant.codec` has the code. Integers of other widths are a name and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

KVDtype = Literal["model", "fp8", "int8", "int4"]
_HALF_BYTES: Final = 2  # of a scale or a minimum


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store a vector.

    Attributes:
        bits: of a code; None where the vector is stored as it is.
        integer: codes count steps from a minimum up; else they are numbers of their own.
        short: its part of names such as ``k8v4``.
        meaning: in a glossary.
        value_group: most channels of a value that share a scale; None is all of them.
    """

    bits: int | None
    integer: bool
    short: str
    meaning: str
    value_group: int | None = None

    @property
    def levels(self) -> int:
        """The largest integer code."""
        assert self.integer and self.bits is not None
        return (1 << self.bits) - 1

    @property
    def per_byte(self) -> int:
        """Codes in a byte: a vector has a multiple of them."""
        return 1 if self.bits is None else 8 // self.bits

    def vector_bytes(self, head_dim: int, model_dtype_bytes: int, groups: int = 1) -> int:
        """One stored vector with the scales, and minima, of its groups."""
        if self.bits is None:
            return head_dim * model_dtype_bytes
        return head_dim // self.per_byte + (1 + self.integer) * _HALF_BYTES * groups

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
    "model": Storage(None, False, "16", "the model's own dtype"),
    "int8": Storage(8, True, "8", "8 bits for each number"),
    "int4": Storage(4, True, "4", "4 bits for each number", value_group=64),
    "fp8": Storage(8, False, "f8", "8-bit floating point"),
}
