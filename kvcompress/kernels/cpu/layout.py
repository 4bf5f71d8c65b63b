"""The structures of src/kvc.h, src/decode.h and src/compact.c, field by field.

C trusts what it is told. So every address in them comes from `address`, which makes sure of what
lies there, and every place in an array was checked against the array's length: here, when a
structure is made, and not again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Final

from kvcompress.plan import KVDtype
from kvcompress.quant.codec import has_minimum, row_elements

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.quant.codec import Codes

DTYPES: Final = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "fp8": 5}
ATTEND: Final = 1
STORE: Final = 2
NO_VOTE, VOTE, LIFT = 0, 1, 2
MAX_ROWS: Final = 64
MAX_DIM: Final = 512


class CodesStruct(Structure):
    """`kvc_codes`."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("minimum", c_void_p),
        ("dtype", c_int32),
        ("dim", c_int32),
        ("groups", c_int32),
        ("row_bytes", c_int32),
        ("slots", c_int64),
    )


class GroupStruct(Structure):
    """`kvc_group`."""

    _fields_ = (
        ("keys", CodesStruct),
        ("values", CodesStruct),
        ("position", c_void_p),
        ("score", c_void_p),
        ("recent_score", c_void_p),
        ("windows", c_void_p),
        ("classes", c_void_p),
        ("by_score", c_void_p),
        ("keeps_rest", c_void_p),
        ("rules_stride", c_int64),
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


class LayerStruct(Structure):
    """`kvc_layer`."""

    _fields_ = (
        ("batch", c_int32),
        ("heads", c_int32),
        ("queries", c_int32),
        ("dim", c_int32),
        ("value_dim", c_int32),
        ("sinks", c_int32),
        ("exact", c_int32),
        ("dtype", c_int32),
        ("exact_k", c_void_p),
        ("exact_v", c_void_p),
        ("exact_position", c_void_p),
        ("exact_class", c_void_p),
        ("start", c_void_p),
        ("center", c_void_p),
        ("scale", c_void_p),
        ("window", c_int64),
        ("block", c_int64),
        ("groups", POINTER(GroupStruct)),
        ("segments", POINTER(SegmentStruct)),
        ("segment_count", c_int64),
    )


class StepStruct(Structure):
    """`kvc_step`."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("query_row", c_int64),
        ("query_head", c_int64),
        ("key_row", c_int64),
        ("key_head", c_int64),
        ("value_row", c_int64),
        ("value_head", c_int64),
        ("out", c_void_p),
        ("flags", c_void_p),
        ("sinks", c_void_p),
        ("position", c_int64),
        ("first_vote", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
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

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_row", c_int64),
        ("key_head", c_int64),
        ("key_token", c_int64),
        ("value_row", c_int64),
        ("value_head", c_int64),
        ("value_token", c_int64),
        ("row", c_void_p),
        ("head", c_void_p),
        ("token", c_void_p),
        ("slot", c_void_p),
        ("count", c_int64),
        ("center", c_void_p),
        ("scale", c_void_p),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
    )


STRUCTS: Final = (CodesStruct, GroupStruct, SegmentStruct, LayerStruct, StepStruct)


def address(tensor: Tensor, dtype: str, *shape: int) -> int:
    """Where the elements of a tensor lie.

    Raises:
        ValueError: where it is not a dense array on the CPU of this dtype and shape.
    """
    found = (tensor.device.type, str(tensor.dtype)[6:], tuple(tensor.shape))
    if found != ("cpu", dtype, shape) or not tensor.is_contiguous():
        raise ValueError(f"C was to be given cpu {dtype} {shape}, this is {found}")
    return tensor.data_ptr()


def codes_struct(codes: Codes, dtype: KVDtype, dim: int, model_dtype: str) -> CodesStruct:
    """Where flat codes of `dim` channels lie.

    Raises:
        ValueError: where data, scales and minima are not those of one number of slots.
    """
    slots, row = codes.data.shape[0], row_elements(dtype, dim)
    held = {"model": model_dtype, "fp8": "float8_e4m3fn"}.get(dtype, "uint8")
    groups = 1 if codes.scale is None else codes.scale.shape[-1]
    coded = dtype != "model"
    if (codes.scale is not None) != coded or (codes.minimum is not None) != has_minimum(dtype):
        raise ValueError(f"codes of {dtype} with scale {codes.scale}, minimum {codes.minimum}")
    if dim > MAX_DIM or dim % groups:
        raise ValueError(f"vectors of {dim} channels in {groups} groups")
    return CodesStruct(
        data=address(codes.data, held, slots, row),
        scale=_meta(codes.scale, slots, groups),
        minimum=_meta(codes.minimum, slots, groups),
        dtype=DTYPES[dtype if coded else model_dtype],
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
