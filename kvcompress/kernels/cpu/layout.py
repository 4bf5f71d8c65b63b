"""The structures of src/kvc.h, src/decode.h and src/compact.c, field by field."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
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
    )


STRUCTS: Final = (CodesStruct, GroupStruct, SegmentStruct, LayerStruct, StepStruct)


def codes_struct(codes: Codes, dtype: str, dim: int) -> CodesStruct:
    """Where flat codes of `dim` channels lie; `dtype` as a plan names it."""
    number = DTYPES[str(codes.data.dtype)[6:] if dtype == "model" else dtype]
    return CodesStruct(
        data=codes.data.data_ptr(),
        scale=None if codes.scale is None else codes.scale.data_ptr(),
        minimum=None if codes.minimum is None else codes.minimum.data_ptr(),
        dtype=number,
        dim=dim,
        groups=1 if codes.scale is None else codes.scale.shape[-1],
        row_bytes=codes.data.shape[-1] * codes.data.element_size(),
    )
