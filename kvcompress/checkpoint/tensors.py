"""Checks of a model directory's weights: files are whole, no tensor is missing, all are numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.checkpoint.settings import INDEX, INDEX_BYTES
from kvcompress.errors import UnsupportedModelError
from kvcompress.strict import NotStrictError, load_json, read_bytes, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS: Final = "model.safetensors"
LARGEST: Final = 65504.0  # the largest float16, as scales are stored; weights are below 1000
_PER_BYTE: Final = 8  # weights that one byte of a file can hold at most
_WHOLE: Final = "give a complete model"


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file, unread."""

    dtype: str
    shape: tuple[int, ...]


def headers(path: Path) -> dict[str, Header]:
    """The tensors of a safetensors file.

    Raises:
        UnsupportedModelError: if it is not one, or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: Header(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        reason = shown(str(error), 200)
        raise UnsupportedModelError(f"{path}: not a whole safetensors file ({reason})") from None


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files, from the index where there is one.

    Raises:
        UnsupportedModelError: if the index names something else than files beside it.
    """
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    return sorted({*weight_map(folder).values()})


def weight_map(folder: Path) -> dict[str, str]:
    """The index: the file of each tensor.

    Raises:
        UnsupportedModelError: if it is none.
    """
    path = folder / INDEX
    try:
        found = load_json(read_bytes(path, INDEX_BYTES))
    except NotStrictError as error:
        raise UnsupportedModelError(f"{path}: {error}; {_WHOLE}") from None
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UnsupportedModelError(f"{path}: has no weight_map; {_WHOLE}")
    for name in listed.values():
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{path}: {shown(name)!r} is not the name of a safetensors file beside it"
            )
    return listed


def check_files(name: str, folder: Path, files: list[str]) -> None:
    """Every weight file is there and whole.

    Raises:
        UnsupportedModelError: naming the file.
    """
    for file in files:
        if not (folder / file).is_file():
            raise UnsupportedModelError(
                f"{name}: cannot load the weights ({file} is not there); give a complete model in "
                "safetensors files"
            )
        headers(folder / file)


def check_size(name: str, files: list[Path], skeleton: nn.Module) -> None:
    """Refuse files too small for the model, before memory is taken for weights that they lack.

    Raises:
        UnsupportedModelError: where they are too small.
    """
    stored_bytes = sum(file.stat().st_size for file in files)
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    if needed > _PER_BYTE * stored_bytes:
        raise UnsupportedModelError(
            f"{name}: config.json describes {needed} weights, and its files have {stored_bytes} "
            f"bytes; {_WHOLE}"
        )


def check_report(name: str, report: Mapping[str, Collection[object] | None], exact: bool) -> None:
    """Refuse a load that transformers reports as incomplete: it fills gaps with random numbers.

    Raises:
        UnsupportedModelError: naming the first tensor that is wrong.
    """
    for check, what in REPORT_CHECKS.items():
        if check == "unexpected_keys" and not exact:
            continue
        wrong = sorted(map(str, report.get(check) or ()))
        if wrong:
            raise UnsupportedModelError(f"{name}: {shown(wrong[0], 120)} {what}; {_WHOLE}")


def check_values(name: str, model: nn.Module) -> None:
    """Every weight is a finite number, and none is larger than weights are.

    Raises:
        UnsupportedModelError: naming the first tensor that is wrong.
    """
    for key, value in model.named_parameters():
        most = largest(value)
        if not math.isfinite(most):
            raise UnsupportedModelError(f"{name}: {key} holds NaN or infinite values; {_WHOLE}")
        if most > LARGEST:
            raise UnsupportedModelError(
                f"{name}: {key} holds {most:g}, and no weight is beyond {LARGEST:g}; {_WHOLE}"
            )
    for key, buffer in model.named_buffers():
        if math.isnan(largest(buffer)):
            raise UnsupportedModelError(f"{name}: {key} holds NaN; {_WHOLE}")


def largest(value: Tensor) -> float:
    """The largest magnitude, NaN where an element is; 0 for whole numbers."""
    if not value.is_floating_point() or not value.numel() or value.device.type == "meta":
        return 0.0
    if value.element_size() == 1:  # float8 has no arithmetic of its own
        return max((largest(p.float()) for p in value.reshape(-1).split(2**24)), key=_nan_first)
    low, high = value.detach().aminmax()
    return max(-float(low), float(high), key=_nan_first)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def is_finite(value: Tensor) -> bool:
    """Whether every element is a finite number; whole numbers are."""
    return math.isfinite(largest(value))


# the lists of transformers' report, and what it means for a tensor to be in one
REPORT_CHECKS: Final = {
    "missing_keys": "is not among its weights",
    "mismatched_keys": "has another shape than config.json says",
    "error_msgs": "was reported while loading",
    "unexpected_keys": "is not a tensor of the model",
}
