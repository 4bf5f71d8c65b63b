"""Weight formats of a bundle, one file each; a new one is a new file and a line here."""

from __future__ import annotations

from typing import Final

from kvcompress.quant.weights import bf16, int8, nf4
from kvcompress.quant.weights.base import WeightFormat

FORMATS: Final[dict[str, WeightFormat]] = {
    "bf16": bf16.FORMAT,
    "int8": int8.FORMAT,
    "nf4": nf4.FORMAT,
}
