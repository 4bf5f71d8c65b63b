"""Shrink a language model's weights and its KV cache, per head, and run the result.

    import kvcompress

    model, tokenizer = kvcompress.load("bundle")
    model.generate(**tokenizer("Note: amber river", return_tensors="pt"))

Names are imported on first use: `import kvcompress` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.bundle.load import load as load
    from kvcompress.errors import KVCompressError as KVCompressError
    from kvcompress.plan import Plan as Plan
    from kvcompress.profile.store import Profile as Profile
    from kvcompress.recipe import Recipe as Recipe
    from kvcompress.runtime.cache.cache import CompressedCache as CompressedCache
    from kvcompress.runtime.cache.new import new_cache as new_cache
    from kvcompress.runtime.hf.attach import attach as attach
    from kvcompress.runtime.hf.attach import detach as detach
    from kvcompress.runtime.model.chat import system_span as system_span
    from kvcompress.runtime.static.cache import StaticCompressedCache as StaticCompressedCache

__version__ = "0.1.0"

_HOME = {
    "CompressedCache": "kvcompress.runtime.cache.cache",
    "KVCompressError": "kvcompress.errors",
    "Plan": "kvcompress.plan",
    "Profile": "kvcompress.profile.store",
    "Recipe": "kvcompress.recipe",
    "StaticCompressedCache": "kvcompress.runtime.static.cache",
    "attach": "kvcompress.runtime.hf.attach",
    "detach": "kvcompress.runtime.hf.attach",
    "load": "kvcompress.bundle.load",
    "new_cache": "kvcompress.runtime.cache.new",
    "system_span": "kvcompress.runtime.model.chat",
}

__all__ = [
    "CompressedCache",
    "KVCompressError",
    "Plan",
    "Profile",
    "Recipe",
    "StaticCompressedCache",
    "__version__",
    "attach",
    "detach",
    "load",
    "new_cache",
    "system_span",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kvcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
