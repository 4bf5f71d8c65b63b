"""How the Triton kernels are cut: a small table of measured settings, and how long a chunk is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

import torch
from torch import Tensor

from kvcompress.plan import KVDtype

# architecture → storage → widest head_dim → the fields of a SplitConfig
Table = dict[str, dict[str, dict[str, list[int]]]]
SMALLEST_CHUNK: Final = 64
_WAVES: Final = 8  # programs for each multiprocessor, so that the last ones even out
_CPU_UNITS: Final = 1


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Settings of `decode_pieces`.

    Attributes:
        tokens: of a tile; a power of two.
        warps, stages: as Triton has them.
        chunk_tokens: most tokens of one program.
    """

    tokens: int
    warps: int
    stages: int
    chunk_tokens: int


@cache
def _table() -> Table:
    text = files("kvcompress.kernels").joinpath("tuning.json").read_text(encoding="utf-8")
    table: Table = json.loads(text)
    return table


def architecture(device: torch.device) -> str:
    """As the table names it: ``sm_90``; ``default`` for what is not CUDA."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def split_config(
    k_dtype: KVDtype, v_dtype: KVDtype, head_dim: int, device: torch.device
) -> SplitConfig:
    """The measured settings for this architecture, or the default ones."""
    return lookup(_table(), architecture(device), f"{k_dtype}/{v_dtype}", head_dim)


def lookup(table: Table, arch: str, storage: str, head_dim: int) -> SplitConfig:
    """The entry for a head of `head_dim` channels.

    Raises:
        KeyError: for a table without an entry that is wide enough.
    """
    for part in (table.get(arch, {}), table["default"]):
        sizes = part.get(storage) or part.get("other") or {}
        for most, values in sorted(sizes.items(), key=lambda item: int(item[0])):
            if head_dim <= int(most):
                return SplitConfig(*values)
    raise KeyError(f"no setting for {storage} at head_dim {head_dim}")


def chunk_tokens(total_slots: int, most: int, device: torch.device) -> int:
    """Tokens of a program: so many that every multiprocessor gets several, and at most `most`."""
    units = _CPU_UNITS
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, total_slots // (units * _WAVES))
    chunk = SMALLEST_CHUNK
    while chunk * 2 <= min(wanted, most):
        chunk *= 2
    return chunk


def work_list(capacities: list[tuple[int, int, int, int]], chunk: int) -> list[list[int]]:
    """(first slot, slots, row, head) of every piece of at most `chunk` slots.

    Args:
        capacities: (first slot, slots, row, head) of every segment.
    """
    return [
        [first + low, min(chunk, slots - low), row, head]
        for first, slots, row, head in capacities
        for low in range(0, slots, chunk)
    ]


def words(data: Tensor, dtype: KVDtype) -> Tensor:
    """Rows of codes as the 16-bit words that the kernels read; numbers and levels stay."""
    return data.view(torch.int16) if dtype in ("int8", "int4", "fp8") else data


def refuses(k_dtype: KVDtype, v_dtype: KVDtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernels cannot read this storage, None if they can."""
    for dtype, dim in ((k_dtype, head_dim), (v_dtype, value_dim)):
        parts = {"model": 1, "int8": 2, "fp8": 2, "int4": 4}.get(dtype)
        if dtype in ("rot4", "rot3", "rot2"):
            if dim & (dim - 1) or not 8 <= dim <= 256:
                return f"{dtype} of {dim} channels: powers of two from 8 to 256 are read"
            continue
        if parts is None:
            return f"{dtype} is not read"
        if dim % parts or not 0 < dim <= 256:
            return f"{dtype} of {dim} channels: up to 256 and a multiple of {parts} are read"
    return None
