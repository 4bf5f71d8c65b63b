"""What kernels are told is defined once: the C header, the operators and launches follow it."""

from __future__ import annotations

import ast
import ctypes
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvcompress.kernels
from kvcompress.kernels import ops
from kvcompress.kernels.cpu import layout
from kvcompress.kernels.view import (
    CodesView,
    ExactView,
    GroupView,
    RoomView,
    RowsView,
    TokenView,
    Weakest,
    field_of,
    fields_of,
    flat,
    leaves,
    packed,
)
from tests.kernels import by_reference, evict_cases
from tests.kernels.cases import empty_codes, split

KERNELS = Path(kvcompress.kernels.__file__).parent
MOST_PARAMETERS = 10
POINTERS = {
    "float32": "float",
    "float16": "uint16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "bool": "uint8_t",
    "model": "void",
    "codes": "void",
}
VIEWS = {
    "kvc_codes": CodesView,
    "kvc_group": GroupView,
    "kvc_exact": ExactView,
    "kvc_token": TokenView,
}


# ---- the C header
def declared() -> dict[str, list[tuple[str, str]]]:
    """(name, type) of every field of each structure in view.h; ``float *`` is a pointer."""
    text = (KERNELS / "cpu" / "src" / "view.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        fields = []
        for line in filter(None, map(str.strip, body.split(";"))):
            kind, rest = re.fullmatch(r"(?:const )?(\w+)\s+(.*)", line, re.DOTALL).groups()
            for one in rest.split(","):
                star = " *" if "*" in one else ""
                fields.append((one.strip(" *\n"), kind + star))
        found[name] = fields
    return found


def in_c(kind: type) -> str:
    """A field of a ctypes.Structure as the header has it; addresses without what lies there."""
    numbers = {ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t", ctypes.c_float: "float"}
    if kind in numbers:
        return numbers[kind]
    if issubclass(kind, ctypes.Structure):
        return kind.__doc__.strip("`.")
    return "*"


@pytest.mark.parametrize("struct", layout.STRUCTS, ids=lambda s: s.__name__)
def test_the_header_has_the_fields_of_the_structures(struct):
    header = declared()[struct.__doc__.strip("`.")]
    mine = [(name, in_c(kind)) for name, kind in struct._fields_]
    assert mine == [(name, "*" if "*" in kind else kind) for name, kind in header]


def test_the_header_has_these_structures_in_this_order():
    assert list(declared()) == [struct.__doc__.strip("`.") for struct in layout.STRUCTS]


@pytest.mark.parametrize("name", VIEWS)
def test_the_header_points_to_what_the_views_say(name):
    header = dict(declared()[name])
    for field in fields_of(VIEWS[name]):
        if field.kind is torch.Tensor and not field.strided:
            assert header[field.name] == POINTERS[field.dtype] + " *"


# ---- what C is told
AXES = {"B": 2, "H": 3, "E": 5, "D": 8, "Dv": 4}


def exact() -> ExactView:
    return ExactView(
        torch.zeros(2, 3, 5, 8),
        torch.zeros(2, 3, 5, 4),
        torch.zeros(2, 5, dtype=torch.int32),
        None,
        1,
    )


def test_a_view_in_c_has_its_addresses():
    view = exact()
    struct = layout.pack(layout.ExactStruct, view, "float32", **AXES)
    assert (struct.k, struct.position) == (view.k.data_ptr(), view.position.data_ptr())
    assert (struct.flags, struct.sinks) == (None, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.zeros(2, 3, 4, 8)},
        {"v": torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)},
        {"k": torch.zeros(2, 3, 8, 5).mT},
        {"position": torch.zeros(2, 5, dtype=torch.int64)},
        {"flags": torch.zeros(2, 4, dtype=torch.uint8)},
        {"k": torch.zeros(2, 3, 5, 8, device="meta")},
        {"k": None},
    ],
    ids=str,
)
def test_a_view_that_is_not_as_its_table_is_refused(wrong):
    with pytest.raises(ValueError, match="C was to be given"):
        layout.pack(layout.ExactStruct, exact()._replace(**wrong), "float32", **AXES)


def test_codes_of_another_number_of_slots_are_refused():
    position = torch.zeros(9, dtype=torch.int32)
    k, v = (empty_codes("int8", slots, 8, 1, torch.float32) for slots in (9, 8))
    axes = {"N": 9, "Ns": 9, "B": 1, "Ms": 1, "R": 1}
    layout.pack(layout.GroupStruct, GroupView(k, k, position, None, None), "float32", **axes)
    with pytest.raises(ValueError, match=r"uint8 \(9, 8\), this is .*\(8, 8\)"):
        layout.pack(layout.GroupStruct, GroupView(k, v, position, None, None), "float32", **axes)


def test_vectors_are_dense_and_may_lie_in_any_order():
    token = torch.zeros(2, 1, 3, 8).transpose(1, 2)
    struct = layout.vectors(token, "float32", 2, 3, 1, 8)
    assert (struct.data, struct.row, struct.head) == (token.data_ptr(), 24, 8)
    with pytest.raises(ValueError, match="vectors"):
        layout.vectors(torch.zeros(2, 3, 1, 16)[..., ::2], "float32", 2, 3, 1, 8)


# ---- the operators
def test_leaves_and_back():
    case = split("int8", "model", 16, 16, 2)
    field = field_of("group", GroupView)
    names, values = [leaf.name for leaf in leaves(field)], flat([case.group])
    assert names[:3] == ["group_k_data", "group_k_scale", "group_k_minimum"]
    assert len(names) == len(values)
    again = packed(field, iter(values))
    assert isinstance(again.v, CodesView)
    assert all(a is b for a, b in zip(flat([again]), values, strict=True))


def test_a_schema():
    fields = [field_of("rows", RowsView), field_of("chunk", int), field_of("vote", str)]
    assert ops.schema(fields, ["rows_start"], Weakest) == (
        "(Tensor rows_seen, Tensor(a1!) rows_start, Tensor rows_row_seen, "
        "Tensor? rows_class_counts, Tensor? rows_valid, SymInt chunk, str vote) -> (Tensor, Tensor)"
    )


class Lone(NamedTuple):
    counts: Annotated[torch.Tensor, "int32 [H]"]


def lone(room: RoomView) -> Lone:
    return Lone(room.cap + room.capacity)


def test_an_operator_may_give_one_tensor(monkeypatch):
    """torch has it by itself, not as a tuple of one."""
    monkeypatch.setattr(lone, "__module__", f"{__name__}.reference")
    monkeypatch.setitem(sys.modules, f"{__name__}.triton", SimpleNamespace(lone=lone))
    monkeypatch.setitem(sys.modules, f"{__name__}.reference", sys.modules[__name__])
    called = ops.operator("", lambda room: Lone(torch.empty_like(room.cap)), lone)
    room = RoomView(*(torch.full((3,), n, dtype=torch.int32) for n in (1, 2, 5)))
    assert isinstance(called(room), Lone)
    assert called(room).counts.tolist() == [7, 7, 7]
    with FakeTensorMode() as mode:
        fake = called(RoomView(*map(mode.from_tensor, room)))
    assert fake.counts.shape == (3,)


def test_operators_name_what_their_kernels_write():
    """Over the cases of eviction: nothing else is written, and each of them is."""
    written: dict[str, set[str]] = {}

    def watched(name):
        arguments = getattr(torch.ops.kvcompress, name).default._schema.arguments
        allowed = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        seen = written.setdefault(name, set())

        def call(*views):
            before = [t.clone() if isinstance(t, torch.Tensor) else t for t in flat(views)]
            found = getattr(by_reference, name)(*views)
            for argument, old, new in zip(arguments, before, flat(views), strict=True):
                if isinstance(new, torch.Tensor) and not torch.equal(old, new):
                    seen.add(argument.name)
            assert seen <= allowed
            return found

        return call, allowed

    names = ("row_advance", "score_select", "kv_append")
    calls = {name: watched(name) for name in names}
    evict_cases.run(SimpleNamespace(**{name: calls[name][0] for name in names}), "one", True)
    exact, rows, room, rule = evict_cases.shared("one", True)
    rows.start.fill_(-1)  # rows that begin
    calls["row_advance"][0](None, exact, rows, room, rule)
    assert written == {name: calls[name][1] for name in names}


def test_the_operator_of_attention_names_what_it_writes():
    arguments = torch.ops.kvcompress.decode_pieces.default._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None]
    assert written == ["parts_accumulated", "parts_maximum", "parts_total", "logits"]
    arguments = torch.ops.kvcompress.decode_combine.default._schema.arguments
    assert not any(a.alias_info for a in arguments)


# ---- parameters
def test_no_function_of_the_kernels_has_many_parameters():
    most = {}
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
                most[f"{path.relative_to(KERNELS)}:{node.name}"] = count
    assert {name: n for name, n in most.items() if n > MOST_PARAMETERS} == {}
