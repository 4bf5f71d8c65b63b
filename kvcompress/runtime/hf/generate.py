"""transformers' `generate` on a model with a plan: it uses the compressed cache, or an error says
why not.

`attach` puts functions of this file in place of the model's methods. Our `generate` only checks the
arguments and calls transformers' own, which then calls us back: for the cache (`_prepare_cache`)
and to feed the prompt (`_prefill`, or `_drafts` where a draft comes with it). Before every forward
we check that it did call back, so that a release that no longer does so is noticed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kvcompress.errors import KVCompressError, UnsupportedModelError
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.names import CACHE, Arguments, release, with_one_cache
from kvcompress.runtime.static.cache import StaticCompressedCache

# arguments that keep `generate` from the compressed cache, and their values that do not ask for it
_BYPASSES: Final = {"use_cache": (None, True), "cache_implementation": (None,)}


@dataclass(slots=True)
class _Running:
    """A call of `generate` that runs now, and the callbacks that transformers has made so far."""

    model: PreTrainedModel
    own_loop: bool  # the caller's function decodes, transformers only prepares
    cache_prepared: bool = False
    prompt_fed: bool = False

    def check_forward(self, model: PreTrainedModel, cache: object) -> None:
        """Refuse a forward for which transformers did not ask us.

        Raises:
            KVCompressError: naming the release and the method that it did not call.
        """
        if self.model is not model or self.own_loop:
            return
        missed = None
        if not self.cache_prepared:
            missed = "_prepare_cache_for_generation"
        elif isinstance(cache, CompressedCache) and not self.prompt_fed:
            missed = "_prefill"
        if missed is not None:
            raise KVCompressError(
                f"generate of {release()} fed {type(model).__name__} without calling its {missed}, "
                "which kvcompress needs; use a tested release, or pass forwards by hand"
            )


RUNNING: ContextVar[_Running | None] = ContextVar("kvcompress_generate", default=None)


def override(model: PreTrainedModel) -> None:
    """Put our functions in place of the model's methods.

    Raises:
        UnsupportedModelError: where this release has no such methods.
    """
    missing = [name for name in _OVERRIDES if not hasattr(type(model), name)]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} of {release()} has no {missing[0]}, through which its "
            "generate would get the compressed cache; use a tested release"
        )
    model.__dict__.update({name: partial(f, model) for name, f in _OVERRIDES.items()})


def restore(model: PreTrainedModel) -> None:
    """Undo `override`."""
    for name in _OVERRIDES:
        model.__dict__.pop(name, None)


def _generate(model: PreTrainedModel, *args: object, **kwargs: object) -> object:
    """`generate` with the arguments that lead to the compressed cache."""
    kwargs = with_one_cache(kwargs)
    own_loop = kwargs.get("custom_generate")
    if isinstance(own_loop, str) or kwargs.get("trust_remote_code"):
        raise KVCompressError(
            f"custom_generate={own_loop!r}, trust_remote_code={kwargs.get('trust_remote_code')}: "
            "generate would run code of a repository, and remote code is never run"
        )
    given = kwargs.get(CACHE)
    if given is None or isinstance(given, CompressedCache):
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        _refuse_bypass(model, config, kwargs)
    token = RUNNING.set(_Running(model, own_loop is not None))
    try:
        return _original(model, "generate")(model, *args, **kwargs)
    finally:
        RUNNING.reset(token)


def _refuse_bypass(model: PreTrainedModel, config: object, kwargs: Arguments) -> None:
    """Refuse arguments of the caller that go past the compressed cache. A checkpoint's own settings
    are about transformers' caches and do not count."""
    for name, harmless in _BYPASSES.items():
        value = kwargs.get(name)
        if name not in kwargs and config is not None:
            value = getattr(config, name, None)
            if value == getattr(model.generation_config, name, None):
                continue
        if value not in harmless:
            raise KVCompressError(
                f"generate({name}={value!r}) would go past the compressed cache; drop it, or call "
                "kvcompress.detach(model) first"
            )


def _prepare_cache(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: Arguments,
    *args: object,
    **kwargs: object,
) -> None:
    """`generate` asks for a cache: ours, unless the caller passed another kind."""
    running, given = RUNNING.get(), model_kwargs.get(CACHE)
    if running is not None and running.model is model:
        running.cache_prepared = True
    if isinstance(given, StaticCompressedCache):
        given.check_length(generation_config.max_length - 1)  # the last token is not fed back
    if given is None or isinstance(given, CompressedCache):
        # a checkpoint's settings are about transformers' own caches, see `_refuse_bypass`
        generation_config.use_cache, generation_config.cache_implementation = True, None
    if given is None:
        cache = model_kwargs[CACHE] = new_cache(model)
        if getattr(generation_config, "is_assistant", False):
            cache.assists = True
            cache.activate_past_recording()
        return
    original = _original(model, "_prepare_cache_for_generation")
    original(model, generation_config, model_kwargs, *args, **kwargs)


def _prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: Arguments,
    *args: object,
    **kwargs: object,
) -> object:
    """`generate` feeds the prompt, at once or in chunks: the cache learns where it ends."""
    cache = model_kwargs.get(CACHE)
    _note_prompt(model)
    original = _original(model, "_prefill")
    if not isinstance(cache, CompressedCache):
        return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    _check_text(cache, input_ids, generation_config, model_kwargs)
    cache.begin_prefill()
    out = original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    cache.finish_prompt(model)
    return out


def _drafts(model: PreTrainedModel, **kwargs: Any) -> object:
    """Assisted decoding and prompt lookup feed the prompt together with the first draft."""
    model_kwargs = kwargs["model_kwargs"]
    cache = model_kwargs.get(CACHE)
    _note_prompt(model)
    if isinstance(cache, CompressedCache):
        _check_text(cache, kwargs["input_ids"], kwargs["generation_config"], model_kwargs)
    return _original(model, "_get_candidate_generator")(model, **kwargs)


def _original(model: PreTrainedModel, name: str) -> Callable[..., object]:
    """The method of transformers in whose place `override` put ours."""
    method: Callable[..., object] = getattr(type(model), name)
    return method


def _note_prompt(model: PreTrainedModel) -> None:
    running = RUNNING.get()
    if running is not None and running.model is model:
        running.prompt_fed = True


def _check_text(
    cache: CompressedCache,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: Arguments,
) -> None:
    """Check a prompt for a cache that holds tokens already. It may be the whole text, which must
    begin with the tokens of the cache, or the new tokens alone with a mask of the whole text.

    Raises:
        KVCompressError: for a prompt that is neither.
    """
    seen, length = int(cache.get_seq_length()), input_ids.shape[1]
    if not seen or cache.assists or model_kwargs.get("inputs_embeds") is not None:
        return
    mask = model_kwargs.get("attention_mask")
    # since 5.18 transformers drops a mask of ones and notes its length
    shown = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
    if shown == seen + length and shown != length:
        return
    if length == seen:
        raise KVCompressError(
            f"the cache has seen all {seen} tokens of this prompt already, so there is nothing to "
            "feed; pass the prompt with what follows it, or call cache.reset()"
        )
    if shown != length or length < seen:
        raise KVCompressError(
            f"a prompt of {length} tokens with a mask of {shown}, and the cache has seen {seen}: "
            f"pass the whole text, its cached beginning included, or new tokens with a mask of "
            f"{seen + length}; cache.reset() empties it"
        )
    if cache.seen_text.rows is not None:
        cache.check_prefix(input_ids)


def _refuse_generate_batch(model: PreTrainedModel, *args: object, **kwargs: object) -> NoReturn:
    raise KVCompressError(
        "generate_batch uses its own paged cache and would run uncompressed; call generate instead"
    )


_OVERRIDES: Final[dict[str, Callable[..., object]]] = {
    "generate": _generate,
    "_prepare_cache_for_generation": _prepare_cache,
    "_prefill": _prefill,
    "_get_candidate_generator": _drafts,
    "generate_batch": _refuse_generate_batch,
}
