"""Views as arguments of a Triton kernel: tuples with the names of the view's fields.

Inside of a kernel ``exact.k`` is a pointer, ``exact.sinks`` a number, and what a view's table calls
constant is known when the kernel is compiled, as is whether a field is None. A strided tensor is a
`Vectors`. No field may be named as an attribute of Triton's own tuples is: `values` or `type`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.view import Field, Vectors, fields_of

View = TypeVar("View", bound=tuple[object, ...])


def told(view: View) -> View:
    """A view as a kernel takes it."""
    fields = fields_of(type(view))
    values = [_told(field, value) for field, value in zip(fields, view, strict=True)]
    make: Callable[..., View] = type(view)
    if any(isinstance(value, tuple) for value in view):
        # Triton 3.5 forgets, behind a loop, the constants of a view in another one, unless a
        # constant of the outer one follows them
        make = _followed(type(view))
        values.append(tl.constexpr(True))
    return make(*values)


@cache
def _followed(view: type) -> Callable[..., View]:
    """The class of a view with one field more."""
    names = [*(field.name for field in fields_of(view)), "followed"]
    return cast(Callable[..., View], namedtuple(view.__name__, names))


def _told(field: Field, value: object) -> object:
    if isinstance(value, Tensor):
        value = value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
        return Vectors.of(value) if field.strided else value
    if isinstance(value, tuple):
        return told(value)
    return tl.constexpr(value) if field.constant else value
