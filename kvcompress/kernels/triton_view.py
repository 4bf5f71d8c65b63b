"""Views as arguments of a Triton kernel: tuples with the names of the view's fields.

Inside of a kernel ``exact.k`` is a pointer, ``exact.sinks`` a number, and what a view's table calls
constant is known when the kernel is compiled, as is whether a field is None. A strided tensor is a
`Vectors`. No field may be named as an attribute of Triton's own tuples is: `values` or `type`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.view import Field, Vectors, fields_of

View = TypeVar("View", bound=tuple[object, ...])


def told(view: View) -> View:
    """A view as a kernel takes it."""
    fields = fields_of(type(view))
    make: Callable[..., View] = type(view)
    return make(*(_told(field, value) for field, value in zip(fields, view, strict=True)))


def _told(field: Field, value: object) -> object:
    if isinstance(value, Tensor):
        value = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
        return Vectors.of(value) if field.strided else value
    if isinstance(value, tuple):
        return told(value)
    return tl.constexpr(value) if field.constant else value
