"""transformers' own QuantizedCache: its settings, and what it needs to run.

It keeps every token in one code and knows no plan: the model runs as transformers serves it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from kvcompress.plan import StrictModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Cache, PretrainedConfig

_PACKAGES: Final = {"hqq": "hqq", "quanto": "optimum-quanto"}  # what a backend is installed with


class QuantizedCacheSettings(StrictModel):
    """Arguments of ``transformers.QuantizedCache``; what is None is left to its defaults.

    Attributes:
        bits: of one element of a key or value.
        axis: of keys and values; the backends mean different things by it.
    """

    backend: Literal["hqq", "quanto", "fp8"]
    bits: int | None = None
    axis: int | None = None

    def make(self, config: PretrainedConfig) -> Cache:
        """An empty cache; errors as of `caches.quantized_empty`."""
        from kvcompress.measure.caches import quantized_empty

        return quantized_empty(config, self.backend, self.bits, self.axis)

    def description(self) -> str:
        """One line, with the version of the backend's package where it is installed."""
        package = _PACKAGES.get(self.backend)
        if package is None:
            how = f"{self.backend}, one scale per layer for keys and one for values"
        else:
            named = f"{package} {_version(package)}".rstrip()
            coded = f"{self.bits} bits in groups of 64"
            how = f"{named}, {coded}, up to 127 decoded tokens in 16 bits"
        return f"transformers' QuantizedCache, {how}"

    def refusal(self, config: PretrainedConfig) -> str:
        """Why it cannot run here, in one line; empty where it can."""
        package = _PACKAGES.get(self.backend)
        if package is not None and not _version(package):
            return f"needs {package}: pip install 'kvcompress[quantized-cache]'"
        try:
            self.make(config)
        except (ImportError, ValueError) as error:
            return f"transformers {_version('transformers')}: {' '.join(str(error).split())}"
        return ""

    def told(self) -> str:
        """JSON of everything that decides its outcome and is not in `cells.cell_key` already."""
        package = _PACKAGES.get(self.backend, "transformers")
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        parts = {"settings": self.model_dump(), "package": _version(package), "code": code}
        return json.dumps(parts, sort_keys=True)


def _groupwise(backend: Literal["hqq", "quanto"], bits: int) -> QuantizedCacheSettings:
    """As transformers' documentation advises: axis 1 for hqq, 0 for quanto.

    Each then has a scale and a zero for 64 neighbours in one token, so that coding again what was
    coded, as the cache does whenever its residual is full, moves hardly anything.
    """
    axis = 1 if backend == "hqq" else 0
    return QuantizedCacheSettings(backend=backend, bits=bits, axis=axis)


QUANTIZED: Final[dict[str, QuantizedCacheSettings]] = {
    "hf-hqq-int8": _groupwise("hqq", 8),
    "hf-hqq-int4": _groupwise("hqq", 4),
    "hf-hqq-int2": _groupwise("hqq", 2),
    "hf-quanto-int4": _groupwise("quanto", 4),
    "hf-quanto-int2": _groupwise("quanto", 2),
    "hf-fp8": QuantizedCacheSettings(backend="fp8"),
}


@contextmanager
def uncompiled(settings: QuantizedCacheSettings, device: torch.device) -> Iterator[None]:
    """quanto unpacks its codes with PyTorch's own operations inside the block; others are as ever.

    It would compile C++ at the first use, which takes minutes, and a build that was interrupted
    leaves a lock on which every later process waits for ever. The integers are the same.
    """
    if settings.backend != "quanto":
        yield
        return
    import optimum.quanto  # noqa: F401  (defines the operator)
    import torch

    library = torch.library.Library("quanto", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Warning only once for all operators", UserWarning)
        library.impl("unpack", _unpacked, device.type.upper(), allow_override=True)
    try:
        yield
    finally:
        del library  # takes the override back


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits ``[n · R, ...]`` of bytes ``[R, ...]``, the lowest bits of all first."""
    import torch

    mask = (1 << bits) - 1
    return torch.cat([(packed >> low) & mask for low in range(0, 8, bits)])


def _version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
