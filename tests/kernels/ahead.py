"""Compiling kernel launches for a GPU that is not there, down to its machine code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiling_for(capability: int) -> Iterator[dict[str, Any]]:
    """Launches compile for ``sm_<capability>`` and run nothing; gives the compiled, by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    compiled: dict[str, Any] = {}
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        # types of the arguments and what of them is known, as Triton itself finds them out
        bound, specialization, _ = bind(*args, **options)
        found = self._pack_args(backend, options, bound, specialization, None)
        parsed, signature, constants, attributes = found
        source = ASTSource(self, signature, constants, attributes)
        compiled[self.__name__] = compile(source, target=target, options=parsed.__dict__)

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = before
