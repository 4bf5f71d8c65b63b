"""The structures of src/view.h: those of `kvcompress.kernels.view`, and what else C is told.

C trusts what it is told. So every address in them comes from `address`, which makes sure of what
lies there, and every place in an array was checked against the array's length: here, when a
structure is made, and not again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Final, TypeVar

from torch import Tensor

from kvcompress.kernels.view import (
    CodesView,
    ExactView,
    GroupView,
    KeyConstants,
    PromptView,
    Reach,
    Softmax,
    TokenView,
    Vectors,
    fields_of,
)
from kvcompress.quant.codec import has_minimum, row_elements

_STORED: Final = {"int8": 3, "int4": 4, "fp8": 5, "rot4": 6, "rot3": 7, "rot2": 8}
DTYPES: Final = {"float32": 0, "bfloat16": 1, "float16": 2, **_STORED}
STORED: Final = frozenset({"model", *_STORED})  # of the storages, those that C knows
ATTEND: Final = 1
STORE: Final = 2
NO_VOTE, VOTE, LIFT = 0, 1, 2
MAX_ROWS: Final = 64
MAX_DIM: Final = 512
CType = type[Structure] | type[c_int32] | type[c_int64] | type[c_float] | type[c_void_p]
_NUMBERS: Final[dict[str, CType]] = {"int32": c_int32, "int64": c_int64, "float32": c_float}


def in_c(view: type, **nested: type[Structure]) -> tuple[tuple[str, CType], ...]:
    """A view's table as ``_fields_``; `nested` has the structures of the views in it."""
    found: list[tuple[str, CType]] = []
    for field in fields_of(view):
        if field.strided:
            found.append((field.name, VectorsStruct))
        elif field.kind is Tensor:
            found.append((field.name, c_void_p))
        else:
            found.append((field.name, nested.get(field.name) or _NUMBERS[field.dtype]))
    return tuple(found)


class CodesStruct(Structure):
    """`kvc_codes`."""

    _fields_ = (*in_c(CodesView), ("row_bytes", c_int32), ("slots", c_int64))


class VectorsStruct(Structure):
    """`kvc_vectors`."""

    _fields_ = in_c(Vectors)


class GroupStruct(Structure):
    """`kvc_group`."""

    _fields_ = in_c(GroupView, k=CodesStruct, v=CodesStruct)


class KeepStruct(Structure):
    """`kvc_keep`."""

    _fields_ = (
        ("windows", c_void_p),
        ("classes", c_void_p),
        ("by_score", c_void_p),
        ("keeps_rest", c_void_p),
        ("stride", c_int64),
        ("members", c_int64),
    )


class SegmentStruct(Structure):
    """`kvc_segment`."""

    _fields_ = (
        ("group", c_int32),
        ("row", c_int32),
        ("head", c_int32),
        ("member", c_int32),
        ("start", c_int64),
        ("capacity", c_int64),
    )


class ExactStruct(Structure):
    """`kvc_exact`."""

    _fields_ = in_c(ExactView)


class ConstantsStruct(Structure):
    """`kvc_constants`."""

    _fields_ = in_c(KeyConstants)


class ReachStruct(Structure):
    """`kvc_reach`."""

    _fields_ = in_c(Reach)


class LayerStruct(Structure):
    """`kvc_layer`."""

    _fields_ = (
        ("batch", c_int32),
        ("heads", c_int32),
        ("queries", c_int32),
        ("dim", c_int32),
        ("value_dim", c_int32),
        ("held", c_int32),
        ("dtype", c_int32),
        ("exact", ExactStruct),
        ("constants", ConstantsStruct),
        ("reach", ReachStruct),
        ("start", c_void_p),
        ("groups", POINTER(GroupStruct)),
        ("keeps", POINTER(KeepStruct)),
        ("segments", POINTER(SegmentStruct)),
        ("segment_count", c_int64),
    )


class TokenStruct(Structure):
    """`kvc_token`."""

    _fields_ = in_c(TokenView)


class SoftmaxStruct(Structure):
    """`kvc_softmax`."""

    _fields_ = in_c(Softmax)


class StepStruct(Structure):
    """`kvc_step`."""

    _fields_ = (
        ("token", TokenStruct),
        ("softmax", SoftmaxStruct),
        ("out", c_void_p),
        ("position", c_int64),
        ("first_vote", c_int64),
        ("vote", c_int32),
        ("per_vote", c_int32),
        ("newest", c_int32),
        ("what", c_int32),
        ("threads", c_int32),
        ("victim", POINTER(c_int64)),
        ("own_score", POINTER(c_float)),
    )


class PromptStruct(Structure):
    """`kvc_prompt`."""

    _fields_ = in_c(PromptView)


class CompactionStruct(Structure):
    """`kvc_compaction`."""

    _fields_ = (
        ("prompt", PromptStruct),
        ("constants", ConstantsStruct),
        ("count", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
    )


# in the order of src/view.h
STRUCTS: Final[tuple[type[Structure], ...]] = (
    *(CodesStruct, VectorsStruct, GroupStruct, KeepStruct, SegmentStruct, ExactStruct),
    *(ConstantsStruct, ReachStruct, LayerStruct, TokenStruct, SoftmaxStruct, StepStruct),
    *(PromptStruct, CompactionStruct),
)
S = TypeVar("S", bound=Structure)


def pack(struct: type[S], view: tuple[object, ...], model: str, **axes: int) -> S:
    """A view as C has it.

    Args:
        model: dtype of the model's own numbers.
        axes: lengths of the axes that the view's table names.

    Raises:
        ValueError: where a tensor is not what the table says of it.
    """
    told: list[object] = []
    for field, value in zip(fields_of(type(view)), view, strict=True):
        dtype, shape = field.dtype, field.shape
        if value is None and not field.optional:
            raise ValueError(f"C was to be given {field.name} {dtype} {shape}, this is None")
        if isinstance(value, CodesView):
            told.append(codes_struct(value, model, axes["N"]))
        elif isinstance(value, Tensor):
            lengths = [axes[axis] if axis.isalpha() else int(axis) for axis in shape]
            dtype = model if dtype == "model" else dtype
            told.append((vectors if field.strided else address)(value, dtype, *lengths))
        else:
            told.append(value)
    return struct(*told)


def address(tensor: Tensor, dtype: str, *shape: int) -> int:
    """Where the elements of a tensor lie.

    Raises:
        ValueError: where it is not a dense array on the CPU of this dtype and shape.
    """
    found = (tensor.device.type, str(tensor.dtype)[6:], tuple(tensor.shape))
    if found != ("cpu", dtype, shape) or not tensor.is_contiguous():
        raise ValueError(f"C was to be given cpu {dtype} {shape}, this is {found}")
    return tensor.data_ptr()


def vectors(tensor: Tensor, dtype: str, *shape: int) -> VectorsStruct:
    """Where the vectors of a tensor ``[B, H, T, D]`` lie, each of them dense.

    Raises:
        ValueError: where it is no such array on the CPU of this dtype and shape.
    """
    found = (tensor.device.type, str(tensor.dtype)[6:], tuple(tensor.shape))
    if found != ("cpu", dtype, shape) or tensor.stride(-1) != 1:
        raise ValueError(f"C was to be given vectors of cpu {dtype} {shape}, this is {found}")
    return VectorsStruct(tensor.data_ptr(), *tensor.stride()[:3])


def codes_struct(codes: CodesView, model: str, slots: int) -> CodesStruct:
    """Where flat codes of so many slots lie.

    Raises:
        ValueError: where data, scales and minima are not those of this number of slots.
    """
    dtype, dim, groups = codes.dtype, codes.dim, codes.groups
    held = {"model": model, "fp8": "float8_e4m3fn"}.get(dtype, "uint8")
    coded, row = dtype != "model", row_elements(dtype, dim)
    if (codes.scale is not None) != coded or (codes.minimum is not None) != has_minimum(dtype):
        raise ValueError(f"codes of {dtype} with scale {codes.scale}, minimum {codes.minimum}")
    if dim > MAX_DIM or dim % groups:
        raise ValueError(f"vectors of {dim} channels in {groups} groups")
    return CodesStruct(
        data=address(codes.data, held, slots, row),
        scale=_meta(codes.scale, slots, groups),
        minimum=_meta(codes.minimum, slots, groups),
        dtype=DTYPES[dtype if coded else model],
        dim=dim,
        groups=groups,
        row_bytes=row * codes.data.element_size(),
        slots=slots,
    )


def _meta(tensor: Tensor | None, slots: int, groups: int) -> int | None:
    return None if tensor is None else address(tensor, "float16", slots, groups)


def check_segments(segments: Sequence[tuple[int, int]], slots: int) -> None:
    """
    Args:
        segments: (start, capacity) of all segments of a group that has so many slots.

    Raises:
        ValueError: where one leaves the arrays or shares a slot with another.
    """
    stop = 0
    for start, capacity in sorted(segments):
        if start < stop or capacity < 0:
            raise ValueError(f"segments of {capacity} slots at {start}, behind {stop}")
        stop = start + capacity
    if stop > slots:
        raise ValueError(f"segments up to slot {stop} of {slots}")
