"""Mutants of what files hold: JSON trees, and files of safetensors. All chance comes from `rng`.

A mutant is made of parts that were taken apart, so that whoever seals files can seal it again:
a digest that is wrong hides everything behind it.
"""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass
from random import Random
from typing import Any, Final

Tree = Any  # what json.loads gives

NUMBERS: Final = (
    -1, 0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32,
    1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64, 10**30, 10**400,
    0.0, -0.0, 0.5, 1.5, -1.0, 1e-320, 1e38, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS: Final = (
    "", " ", "0", "1", "-1", "nan", "None", "true", "../x", "/etc/passwd", "\x00", "\ud800", "é\n",
    "x" * 5000, "float32", "[]",
)  # fmt: skip


def _strange(rng: Random) -> Tree:
    """Something that no file should hold where it stands."""
    deep: Tree = 0
    for _ in range(rng.choice((5, 50, 80))):  # readers allow 64; three of these can be copied
        deep = [deep] if rng.random() < 0.5 else {"x": deep}
    return rng.choice(
        (None, True, False, [], {}, [[]], [None], {"": 0}, {"tuple": []}, {"range": [0, 1]}, deep)
        + (rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS))
    )


# ---- trees
def places(tree: Tree) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside `tree`."""
    found, left = [], [tree]
    while left:
        now = left.pop()
        keys = list(now) if isinstance(now, dict) else range(len(now))
        for key in keys:
            found.append((now, key))
            if isinstance(now[key], dict | list):
                left.append(now[key])
    return found


def _number(rng: Random, value: int | float) -> int | float:
    """A number near `value`."""
    change = rng.choice((-1, 1, -2, 2, 8, -8, 32, -32, 1 << 20, -(1 << 20), 1 << 22, 1 << 31))
    return rng.choice((value + change, -value, value * 2, value // 2, value + 0.0, value ^ 1
                       if isinstance(value, int) else value))  # fmt: skip


def mutate_tree(rng: Random, tree: Tree, times: int | None = None) -> Tree:
    """A copy of a non-empty `tree` with some values changed, moved, added or taken away."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        spots = places(tree)
        if not spots:
            return tree
        container, key = rng.choice(spots)
        _mutate_at(rng, container, key, spots)
    return tree


def _mutate_at(rng: Random, container: Any, key: Any, spots: list[tuple[Any, Any]]) -> None:
    value = container[key]
    kind = rng.randrange(10)
    if kind < 4 and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = _number(rng, value)
    elif kind < 4 and isinstance(value, list) and len(value) > 1:
        rng.shuffle(value)
    elif kind == 4:
        del container[key]
    elif kind == 5:
        _add(rng, container, key)
    elif kind == 6:
        other, place = rng.choice(spots)
        container[key] = copy.deepcopy(other[place])
    elif kind == 7 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        container[key] = value[:at] + rng.choice("0f x\x00é") + value[at + 1 :]
    elif kind == 8:
        _move_between(rng, spots)
    else:
        container[key] = _strange(rng)


def _add(rng: Random, container: Any, key: Any) -> None:
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        container[rng.choice(("x", "", f"{key}2", "__class__"))] = copy.deepcopy(container[key])


def _move_between(rng: Random, spots: list[tuple[Any, Any]]) -> None:
    """Take from one whole number and give to another of the same list: their sum stays."""
    numbers = [(c, k) for c, k in spots if type(c[k]) is int and isinstance(c, list)]
    if not numbers:
        return
    container, key = rng.choice(numbers)
    others = [k for k in range(len(container)) if type(container[k]) is int and k != key]
    if others:
        amount = rng.choice((1, 2, 32, 1 << 22))
        container[key] += amount
        container[rng.choice(others)] -= amount


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """`data` with some bytes flipped, cut, doubled or put in."""
    changed = bytearray(data)
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(5)
    if kind == 0 and at < len(data):
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
    elif kind == 3:
        changed[at : at + rng.choice((1, 8, 64))] = b""
    else:
        changed[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, rng.randbytes(8)))
    return bytes(changed)


# ---- files of safetensors
DTYPE_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "I16": 2,
    "I32": 4, "I64": 8, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
_FLOATS: Final = {
    "F64": "<d", "F32": "<f", "F16": "<e",
}  # fmt: skip


@dataclass
class Safetensors:
    """A file of safetensors, taken apart.

    Attributes:
        metadata: the header's own, or None.
        entries: dtype, shape and data_offsets of each tensor, in the order of the header.
        data: all tensors' bytes.
    """

    metadata: dict[str, Any] | None
    entries: dict[str, Any]
    data: bytes

    @staticmethod
    def of(raw: bytes) -> Safetensors:
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        return Safetensors(entries.pop("__metadata__", None), entries, raw[8 + length :])

    def header(self) -> bytes:
        """JSON of metadata and entries, with what JSON lacks and surrogates as Python writes them,
        padded to whole 8 bytes."""
        own = {} if self.metadata is None else {"__metadata__": self.metadata}
        text = json.dumps({**own, **self.entries}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    def raw(self) -> bytes:
        header = self.header()
        return len(header).to_bytes(8, "little") + header + self.data


def mutate_safetensors(rng: Random, file: Safetensors) -> Safetensors:
    """A mutant of the header's entries, or of the bytes of a tensor; metadata stay."""
    file = Safetensors(copy.deepcopy(file.metadata), copy.deepcopy(file.entries), file.data)
    if not all(map(_whole, file.entries.values())) or not file.entries:
        return file
    name = rng.choice(list(file.entries))
    change = rng.choice(
        (_tree, _dtype, _reshape, _resize, _drop, _copy_entry, _rename, _swap)
        + (_fill, _fill, _fill, _fill, _some_elements, _some_elements, _some_elements)
    )
    change(rng, file, name)
    return file


def _whole(entry: Any) -> bool:
    """Whether an entry still is one, after a change that did not ask."""
    try:
        start, stop = entry["data_offsets"]
        numbers = [start, stop, *entry["shape"]]
        return (
            all(type(n) is int and 0 <= n < 1 << 30 for n in numbers)
            and entry["dtype"] in DTYPE_BYTES
        )
    except (KeyError, TypeError, ValueError):
        return False


def _tree(rng: Random, file: Safetensors, name: str) -> None:
    file.entries = mutate_tree(rng, file.entries, 1)


def _dtype(rng: Random, file: Safetensors, name: str) -> None:
    """Another dtype, of the same width where there is one: offsets then stay right."""
    old = file.entries[name]["dtype"]
    same = [d for d, size in DTYPE_BYTES.items() if size == DTYPE_BYTES.get(old) and d != old]
    file.entries[name]["dtype"] = rng.choice(same if same and rng.random() < 0.8 else TEXTS)


def _reshape(rng: Random, file: Safetensors, name: str) -> None:
    """The same elements in another shape."""
    shape = file.entries[name]["shape"]
    total = 1
    for size in shape:
        total *= size
    file.entries[name]["shape"] = rng.choice(
        ([total], [1, *shape], [*shape, 1], shape[::-1], [total, 1], [1, total], [-1, -total])
        + ([1 << 20, total, 0], [0], [1 << 40, 0])
    )


def _resize(rng: Random, file: Safetensors, name: str) -> None:
    """More or fewer elements, all tensors behind it moved: the file as a whole is consistent."""
    entry = file.entries[name]
    shape = entry["shape"] or [1]
    axis = rng.randrange(len(shape))
    shape[axis] = max(0, rng.choice((shape[axis] + 1, shape[axis] - 1, shape[axis] * 2, 0, 1)))
    total = DTYPE_BYTES[entry["dtype"]]
    for size in shape:
        total *= size
    entry["shape"] = shape
    start, stop = entry["data_offsets"]
    own = (file.data[start:stop] + b"\0" * total)[:total]
    _put(file, name, own)


def _put(file: Safetensors, name: str, own: bytes) -> None:
    """Other bytes for a tensor; what lies behind it moves."""
    start, stop = file.entries[name]["data_offsets"]
    file.data = file.data[:start] + own + file.data[stop:]
    for other, entry in file.entries.items():
        low, high = entry["data_offsets"]
        moved = len(own) - (stop - start)
        if other == name:
            entry["data_offsets"] = [start, start + len(own)]
        elif low >= stop:
            entry["data_offsets"] = [low + moved, high + moved]


def _drop(rng: Random, file: Safetensors, name: str) -> None:
    _put(file, name, b"")
    del file.entries[name]


def _copy_entry(rng: Random, file: Safetensors, name: str) -> None:
    """One more tensor at the end."""
    entry = file.entries[name]
    start, stop = entry["data_offsets"]
    own = file.data[start:stop]
    end = len(file.data)
    added = {**entry, "data_offsets": [end, end + len(own)]}
    file.entries[rng.choice((f"{name}2", "x", "", name.replace("0", "1", 1) + "x"))] = added
    file.data += own


def _rename(rng: Random, file: Safetensors, name: str) -> None:
    other = rng.choice((name + "x", name[:-1], rng.choice(list(file.entries)), "__proto__"))
    file.entries[other] = file.entries.pop(name)


def _swap(rng: Random, file: Safetensors, name: str) -> None:
    other = rng.choice(list(file.entries))
    entries = file.entries
    entries[name], entries[other] = entries[other], entries[name]


def _fill(rng: Random, file: Safetensors, name: str) -> None:
    """All elements of a tensor the same, or random bytes."""
    entry = file.entries[name]
    start, stop = entry["data_offsets"]
    size = stop - start
    pattern = rng.choice((rng.randbytes(size), _element(rng, entry["dtype"]) * size))
    _put(file, name, pattern[:size])


def _some_elements(rng: Random, file: Safetensors, name: str) -> None:
    """A few elements changed."""
    entry = file.entries[name]
    start, stop = entry["data_offsets"]
    width = DTYPE_BYTES[entry["dtype"]]
    own = bytearray(file.data[start:stop])
    if not own:
        return
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(own) // width) * width
        own[at : at + width] = _element(rng, entry["dtype"], bytes(own[at : at + width]))
    _put(file, name, bytes(own))


def _element(rng: Random, dtype: str, old: bytes | None = None) -> bytes:
    """One element: an extreme one, a random one, or one near `old`."""
    width = DTYPE_BYTES.get(dtype, 1)
    if dtype in _FLOATS and rng.random() < 0.7:
        value = rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1.0, 6e4))
        return struct.pack(_FLOATS[dtype], value)
    if old is not None and rng.random() < 0.5:
        near = int.from_bytes(old, "little") + rng.choice((-1, 1, 2, -2, 8, 1 << 16))
        return (near % (1 << 8 * width)).to_bytes(width, "little")
    ends = (b"\xff" * width, b"\0" * width, b"\xff" * (width - 1) + b"\x7f", b"\0" * (width - 1))
    return rng.choice((*ends, rng.randbytes(width))).ljust(width, b"\x80")
