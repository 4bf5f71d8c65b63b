"""Methods that torch must run outside of inference mode, or outside of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def leaving_plain_tensors(method: Callable[P, R]) -> Callable[P, R]:
    """Run outside of inference mode: what is stored can then be changed in any mode later."""

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


def between_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """Under torch.compile, run as plain Python between two graphs: a growing cache changes its
    shapes and decides by values, which no graph holds."""
    eager: Callable[P, R] = torch.compiler.disable(method)

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return eager(*args, **kwargs)
        return method(*args, **kwargs)

    return wrapped
