"""Names that transformers changes from release to release.

The cache argument of a forward was called `past_key_values` until transformers 5.23 and is called
`cache` since 5.24; the old name goes in 5.40. On every release we accept both, by keyword and by
position, and pass on the name that the installed release knows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from kvcompress.errors import KVCompressError, UntestedReleaseWarning

OLDEST_TESTED: Final = (5, 17)
NEWEST_TESTED: Final = (5, 24)
Arguments = dict[str, Any]  # of a forward or of `generate`, by name
CACHE_NAMES: Final = ("cache", "past_key_values")  # newest first

_PREPARE: Final = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# the name on this release
CACHE: Final = next((name for name in CACHE_NAMES if name in _PREPARE), CACHE_NAMES[0])


def as_argument(cache: Cache | None) -> Arguments:
    """The cache as a keyword, for ``model(ids, **as_argument(cache))``; `generate` alike."""
    return {CACHE: cache}


def cache_of(output: ModelOutput) -> Any:
    """The cache that a forward or `generate` gave back, None where it gave none."""
    return output.get(CACHE)


def forward_arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a model class's forward in order, `self` left out."""
    parameters = inspect.signature(kind.forward).parameters.values()
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in by_place)[1:]


def by_keyword(
    names: tuple[str, ...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Arguments:
    """All arguments of a forward by name, the cache under the name of this release.

    Args:
        names: of the model's own arguments in order, see `forward_arguments`.

    Raises:
        TypeError: for an argument that comes by place and by name, as Python itself would.
        KVCompressError: for two caches.
    """
    if len(args) > len(names):
        raise TypeError(f"{len(args)} arguments by place, the model takes {', '.join(names)}")
    given = dict(zip(names, args, strict=False))
    twice = given.keys() & kwargs.keys()
    if twice:
        raise TypeError(f"{sorted(twice)[0]} is given by place and by name")
    return with_one_cache({**given, **kwargs})


def with_one_cache(given: Arguments) -> Arguments:
    """The arguments with the cache, by whichever name it came, under the name of this release.

    Raises:
        KVCompressError: for two caches.
    """
    caches = {name: given.pop(name) for name in CACHE_NAMES if name in given}
    chosen = [cache for cache in caches.values() if cache is not None]
    if len(chosen) > 1:
        raise KVCompressError(f"two caches, as {' and '.join(caches)}: give one of them")
    if caches:
        given[CACHE] = chosen[0] if chosen else None
    return given


def cropped_tokens(max_length: int | Tensor) -> int:
    """The tokens that ``crop(max_length)`` takes back; a tensor comes before transformers 5.18."""
    return -int(max_length)


def release() -> str:
    """``transformers 5.24.0``, for messages."""
    return f"transformers {transformers.__version__}"


def check_release() -> None:
    """Warn, once in a process, of a release newer than all that were tested.

    Raises:
        KVCompressError: on a release that is too old.
    """
    found = _minor(transformers.__version__)
    if found < OLDEST_TESTED:
        raise KVCompressError(
            f"{release()} is too old: kvcompress needs {_text(OLDEST_TESTED)} or newer; "
            "pip install -U transformers"
        )
    if found > NEWEST_TESTED:
        _warn_of_untested(transformers.__version__)


@lru_cache(maxsize=8)
def _warn_of_untested(version: str) -> None:
    warnings.warn(
        f"transformers {version} is newer than {_text(NEWEST_TESTED)}, the newest release that "
        "kvcompress was tested with; what does not fit raises an error",
        UntestedReleaseWarning,
        stacklevel=5,
    )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(minor: tuple[int, int]) -> str:
    return ".".join(map(str, minor))
