"""Compiling kernel launches for a GPU that is not there, down to its machine code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@contextmanager
def compiling_for(capability: int) -> Iterator[dict[str, Any]]:
    """Launches compile for ``sm_<capability>`` and run nothing; gives the compiled, by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    compiled: dict[str, Any] = {}
    target = GPUTarget("cuda", capability, 32)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.params):
            value = bound[parameter.name]
            kind, divisible = _kind(value)
            if parameter.is_constexpr or kind is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = kind
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, attributes)
        compiled[self.__name__] = compile(source, target=target, options=options)

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = before


def _kind(value: Any) -> tuple[str | None, bool]:
    """The type that Triton would give an argument, None for a constant, and whether it is a
    multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype], True
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return (None if value == 1 else "i32"), value % 16 == 0
    return ("fp32", False) if isinstance(value, float) else (None, False)
