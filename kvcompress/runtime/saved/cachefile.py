"""The file that holds a saved cache: the safetensors format with a digest over every byte.

The first entry of the header's metadata is ``sha256``: the digest of the whole file, its own 64
digits read as zeros. Written and read here, tensor by tensor, because one pass both moves and
hashes the bytes: saving holds no second copy of the cache, and nothing is used before the digest is
known to be right. Any reader of safetensors can open the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from kvcompress import atomic, strict
from kvcompress.errors import KVCompressError
from kvcompress.strict import Json

FORMAT: Final = "kvcompress-cache"
SCHEMA_VERSION: Final = 3  # 1 had no digest of the weights, 2 no positions of key constants
_UNSEALED: Final = b"0" * 64
_OPENING: Final = b'{"__metadata__":{"sha256":"'
_LENGTH_BYTES: Final = 8
_HEADER_LIMIT: Final = 1 << 24  # bytes, which take some 30 times as much memory once parsed
_MOST_AXES: Final = 8
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}

# dtype and shape of each tensor by name
Declared = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class CacheFileError(KVCompressError):
    """A cache file that is missing, damaged, foreign, or of another model, plan or version."""


def write(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write all of it or nothing, see `kvcompress.atomic`.

    Raises:
        CacheFileError: where the file cannot be written; a file that was there stays as it was.
    """
    try:
        with atomic.replacing(path) as file:
            _write(file, metadata, tensors)
    except OSError as error:
        told = error.strerror or error
        raise CacheFileError(f"{path}: cannot be written ({told})") from None


def read(
    path: Path, check: Callable[[dict[str, str], Declared], None]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata, and the tensors on the CPU by name.

    Args:
        check: refuses metadata, and tensors as they are declared, that do not fit; before any
            tensor is read.

    Raises:
        CacheFileError: for a file that is missing, damaged, foreign or of another schema.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for bytes that never come
            raise CacheFileError(f"{path}: not a plain file; give a file that save wrote")
        with path.open("rb") as file:
            header = _read_header(path, file)
            metadata, entries = _parse_header(path, header[_LENGTH_BYTES:])
            size = os.fstat(file.fileno()).st_size
            declared = _check_layout(path, entries, size - len(header))
            check(metadata, declared)
            at = _LENGTH_BYTES + len(_OPENING)
            digest = hashlib.sha256(header[:at] + _UNSEALED + header[at + len(_UNSEALED) :])
            tensors = {name: _read_tensor(file, *own, digest) for name, own in declared.items()}
    except OSError as error:
        raise CacheFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (MemoryError, RuntimeError):  # torch raises a RuntimeError where memory is short
        raise CacheFileError(f"{path}: no memory for a cache of {size} bytes") from None
    if digest.hexdigest() != metadata["sha256"]:
        raise damaged(path, "its sha256 is another")
    return metadata, tensors


def damaged(path: Path, why: str) -> CacheFileError:
    return CacheFileError(f"{path}: the cache file is damaged ({why}); run the prompt again")


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of a tensor; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write(file: BinaryIO, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Header and data, then the digest over both into its place in the header."""
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # aligns every tensor
    header = _header(metadata, {name: tensors[name] for name in names})
    digest = hashlib.sha256(header)
    file.write(header)
    for name in names:
        data = bytes_of(tensors[name])
        digest.update(data)
        file.write(data)
    file.seek(_LENGTH_BYTES + len(_OPENING))
    file.write(digest.hexdigest().encode())


def _header(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """Length and text of the header, the digest's digits zero."""
    content: dict[str, object] = {"__metadata__": {"sha256": _UNSEALED.decode(), **metadata}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.itemsize
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise CacheFileError(f"{len(text)} bytes of counters, a file has room for {_HEADER_LIMIT}")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(path: Path, file: BinaryIO) -> bytes:
    start = file.read(_LENGTH_BYTES + len(_OPENING))
    if start[_LENGTH_BYTES:] != _OPENING:
        raise CacheFileError(f"{path}: not a cache file of kvcompress; give one that save wrote")
    length, size = int.from_bytes(start[:_LENGTH_BYTES], "little"), os.fstat(file.fileno()).st_size
    if not len(_OPENING) + len(_UNSEALED) < length <= min(size - _LENGTH_BYTES, _HEADER_LIMIT):
        raise damaged(path, f"{size} bytes with a header of {length}")
    return start + file.read(length - len(_OPENING))


def _parse_header(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, Json]]:
    """Metadata and the entries of the tensors, in the order of their data."""
    try:
        header = strict.load_json(text, _HEADER_LIMIT)
        metadata = header.pop("__metadata__")
        entries = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        schema = number(metadata["schema_version"])
        if metadata["format"] != FORMAT or schema < 1 or not all_text(metadata):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise damaged(path, "its header cannot be read") from None
    if schema != SCHEMA_VERSION:
        by = metadata.get("kvcompress", "")[:40]
        way = "upgrade kvcompress or run" if schema > SCHEMA_VERSION else "run"
        raise CacheFileError(
            f"{path}: written in schema {schema} by kvcompress {by!r}, this version reads schema "
            f"{SCHEMA_VERSION}; {way} the prompt again"
        )
    return metadata, entries


def number(text: object) -> int:
    """The whole number that `str` wrote.

    Raises:
        ValueError: for anything else, also for a number of more than 18 digits.
    """
    if not isinstance(text, str) or not 0 < len(text) < 19 or str(int(text)) != text:
        raise ValueError(f"{text!r:.40} is no number")
    return int(text)


def all_text(metadata: dict[str, Json]) -> bool:
    return all(isinstance(value, str) for value in metadata.values())


def _check_layout(path: Path, entries: dict[str, Json], data_bytes: int) -> Declared:
    """The tensors fill the rest of the file without gap or overlap."""
    at, found = 0, {}
    try:
        for name, entry in entries.items():
            shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
            numbers = [*shape, *entry["data_offsets"]]
            if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
                raise ValueError
            stop = at + math.prod(shape) * dtype.itemsize
            if len(shape) > _MOST_AXES or entry["data_offsets"] != [at, stop] or len(entry) != 3:
                raise ValueError
            found[name] = (dtype, tuple(shape))
            at = stop
    except (ValueError, KeyError, TypeError):
        raise damaged(path, "its list of tensors cannot be read") from None
    if at != data_bytes:
        raise damaged(path, f"{data_bytes} bytes of tensors, its header says {at}")
    return found


def _read_tensor(
    file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...], digest: hashlib._Hash
) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    data = bytes_of(tensor)
    file.readinto(data)  # type: ignore[attr-defined]  # a short read shows in the digest
    digest.update(data)
    return tensor
