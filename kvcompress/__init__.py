"""Shrink a language model's weights and its KV cache, per head, and run the result.

    import kvcompress

    model, tokenizer = kvcompress.load("bundle")
    model.generate(**tokenizer("Note: amber river", return_tensors="pt"))

Names are imported on first use: `import kvcompress` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress.bundle.attach import attach as attach
    from kvcompress.bundle.load import load as load
    from kvcompress.errors import KVCompressError as KVCompressError
    from kvcompress.evict.scorers import Scorer as Scorer
    from kvcompress.evict.scorers import register_scorer as register_scorer
    from kvcompress.plan import Budget as Budget
    from kvcompress.plan import HeadPlan as HeadPlan
    from kvcompress.plan import Plan as Plan
    from kvcompress.plan import uniform as uniform
    from kvcompress.profile.store import Profile as Profile
    from kvcompress.recipe import Recipe as Recipe
    from kvcompress.runtime.cache.cache import CompressedCache as CompressedCache
    from kvcompress.runtime.cache.new import new_cache as new_cache
    from kvcompress.runtime.hf.attach import detach as detach
    from kvcompress.runtime.model.chat import system_span as system_span
    from kvcompress.runtime.model.families import shape_of as shape_of
    from kvcompress.runtime.static.cache import StaticCompressedCache as StaticCompressedCache

__version__ = "0.1.0"

_HOME = {
    "Budget": "kvcompress.plan",
    "CompressedCache": "kvcompress.runtime.cache.cache",
    "HeadPlan": "kvcompress.plan",
    "KVCompressError": "kvcompress.errors",
    "Plan": "kvcompress.plan",
    "Profile": "kvcompress.profile.store",
    "Recipe": "kvcompress.recipe",
    "Scorer": "kvcompress.evict.scorers",
    "StaticCompressedCache": "kvcompress.runtime.static.cache",
    "attach": "kvcompress.bundle.attach",
    "detach": "kvcompress.runtime.hf.attach",
    "load": "kvcompress.bundle.load",
    "new_cache": "kvcompress.runtime.cache.new",
    "register_scorer": "kvcompress.evict.scorers",
    "shape_of": "kvcompress.runtime.model.families",
    "system_span": "kvcompress.runtime.model.chat",
    "uniform": "kvcompress.plan",
}

__all__ = [
    "Budget",
    "CompressedCache",
    "HeadPlan",
    "KVCompressError",
    "Plan",
    "Profile",
    "Recipe",
    "Scorer",
    "StaticCompressedCache",
    "__version__",
    "attach",
    "detach",
    "load",
    "new_cache",
    "register_scorer",
    "shape_of",
    "system_span",
    "uniform",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kvcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
