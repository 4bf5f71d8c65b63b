"""Checks of weights that bitsandbytes packed, because its kernels trust the sizes in a file."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, Final

from kvcompress.checkpoint.tensors import is_finite
from kvcompress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NOISE: Final = ("inputs will be cast from", "Failed to load CPU gemm_4bit_forward")
_NOISY_LOGGERS: Final = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed, so that it runs no code from the Hub and does not
    log a line for every matrix product.

    On a processor with AVX512-BF16, bitsandbytes 0.50 fetches a compiled kernel from the Hub at
    import if the package `kernels` is installed, and runs it. We hide that package during the
    import; bitsandbytes then takes the kernels that it brings along.

    Its import also has torch compile four steps of optimizers. That alone imports torch's compiler,
    which takes seconds; the steps are compiled when somebody takes the first of them.
    """
    import torch

    for name in _NOISY_LOGGERS:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)
    if "bitsandbytes" in sys.modules:
        return
    hidden = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "kernels"}
    for name in hidden:
        del sys.modules[name]
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python spells "cannot be found"
    compile_now = torch.compile
    torch.compile = partial(_compile_later, compile_now)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:  # a caller that needs it raises its own error
        pass
    finally:
        torch.compile = compile_now
        del sys.modules["kernels"]
        sys.modules.update(hidden)


def _compile_later(
    compile_now: Callable[..., Any], model: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """As `torch.compile`, which this calls when the function is called for the first time."""
    if model is None:
        return partial(_compile_later, compile_now, **options)
    compiled = cache(partial(compile_now, model, **options))

    @wraps(model)
    def first(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return first


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in _NOISE)


def check_packed(name: str, model: nn.Module) -> None:
    """Codes, scales and tables of every packed layer have the sizes and values of that layer.

    Raises:
        UnsupportedModelError: naming the layer.
    """
    for key, module in model.named_modules():
        kind = type(module).__name__
        if not type(module).__module__.startswith("bitsandbytes"):
            continue
        problem = None
        if kind == "Linear8bitLt":
            problem = _int8(module)
        elif kind == "Linear4bit":
            problem = _bits4(module)
        if problem is not None:
            raise UnsupportedModelError(f"{name}: {key}: {problem}; give a complete model")


def _int8(module: Any) -> str | None:
    sizes = (module.out_features, module.in_features)
    weight = module.weight
    if tuple(weight.shape) != sizes or weight.element_size() != 1:
        return f"codes of shape {tuple(weight.shape)} for a layer of {sizes}"
    scale = weight.SCB
    if scale is None or scale.numel() != sizes[0]:
        return f"not one scale for each of {sizes[0]} rows"
    return None if _scales(scale) else "scales that are negative or not finite"


def _bits4(module: Any) -> str | None:
    weight, state = module.weight, getattr(module.weight, "quant_state", None)
    sizes = (module.out_features, module.in_features)
    count = sizes[0] * sizes[1]
    if state is None or tuple(state.shape) != sizes:
        return f"a state that is not that of a layer of {sizes}"
    stored_bytes = weight.numel() * weight.element_size()
    if stored_bytes != -(-count // 2):
        return f"{stored_bytes} bytes of codes for {count} weights"
    problem = _blocks(state, count, 16)
    if problem is None and state.nested:
        if not math.isfinite(float(state.offset)):
            return "an offset that is not finite"
        problem = _blocks(state.state2, state.absmax.numel(), 256)
    return problem


def _blocks(state: Any, count: int, levels: int) -> str | None:
    """Scales and table of `count` values, stored in blocks."""
    if state is None or state.blocksize not in _BLOCKS:
        return "blocks of no known size"
    if state.absmax.numel() != -(-count // state.blocksize):
        return f"{state.absmax.numel()} scales for {count} values in blocks of {state.blocksize}"
    if state.code.numel() != levels:
        return f"a table of {state.code.numel()} levels, not {levels}"
    if not is_finite(state.code):
        return "a table that holds NaN or infinite values"
    return None if _scales(state.absmax) else "scales that are negative or not finite"


def _scales(value: Tensor) -> bool:
    return is_finite(value) and bool((value >= 0).all())
