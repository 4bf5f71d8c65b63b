"""A model with one cache, ready to decode or to read a prompt: what is timed, and its facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from kvcompress.bench.bandwidth import use_threads
from kvcompress.bench.compressed import fill_compressed
from kvcompress.bench.result import Facts, Kind, Timing
from kvcompress.evaluate.quality import weights_bytes
from kvcompress.evaluate.serving import cache_bytes, model_shape
from kvcompress.measure import caches
from kvcompress.measure.caches import Pair
from kvcompress.measure.timing import Case, Samples, case_of, stopwatch
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.names import as_argument

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel

Fill = Literal["synthetic", "prompt"]
_FIRST_ID: Final = 3


@dataclass(frozen=True, slots=True)
class Ready:
    """A case that has been set up.

    Attributes:
        close: lets its memory or its process go.
    """

    case: Case
    facts: Facts
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Entry:
    """A case that can be set up.

    Attributes:
        make: sets it up.
        needs_bytes: of memory, about; a case that does not fit is left out.
    """

    name: str
    kind: Kind
    make: Callable[[], Ready]
    needs_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """Where a decode step is timed.

    Attributes:
        room_tokens: steps that will follow, for caches of fixed size.
    """

    context_tokens: int
    batch: int
    room_tokens: int
    threads: int
    fill: Fill = "synthetic"


@dataclass(frozen=True, slots=True)
class Holder:
    """How a model's cache is made.

    Attributes:
        empty: an empty cache for so many tokens in all.
        filled: a cache that holds ``pair`` in every layer, with room for so many tokens more.
        plan: that the model has attached while it is timed; None for transformers' own caches.
    """

    empty: Callable[[int], Cache]
    filled: Callable[[Pair, int], Cache]
    plan: Plan | None = None
    params: KVParams | None = None


def dynamic_holder(config: PretrainedConfig) -> Holder:
    from transformers import DynamicCache

    return Holder(
        lambda tokens: DynamicCache(config=config), lambda pair, room: caches.dynamic(config, pair)
    )


def static_holder(config: PretrainedConfig) -> Holder:
    from transformers import StaticCache

    return Holder(
        lambda tokens: StaticCache(config=config, max_cache_len=tokens),
        partial(caches.static, config),
    )


def quantized_holder(config: PretrainedConfig, backend: str, bits: int | None = None) -> Holder:
    return Holder(
        lambda tokens: caches.quantized_empty(config, backend, bits),
        lambda pair, room: caches.quantized(config, pair, backend, bits),
    )


def compressed_holder(model: PreTrainedModel, plan: Plan, params: KVParams | None = None) -> Holder:
    from kvcompress.runtime.cache.new import new_cache

    return Holder(
        lambda tokens: new_cache(model),
        lambda pair, room: fill_compressed(plan, params, pair),
        plan,
        params,
    )


def entry_of(
    name: str,
    kind: Kind,
    model: PreTrainedModel,
    holder: Holder,
    size: Size,
    *,
    reads: bool = False,
    needs_bytes: int = 0,
    **told: Any,
) -> Entry:
    """One-token forwards of `model` on a cache of `size`.

    Args:
        reads: forwards over a whole prompt of random ids instead, each into a new cache.
        told: further `Facts`.
    """

    def make() -> Ready:
        serve = partial(_serve, model, holder, size.threads)
        serve()
        step: Callable[[], object]
        if reads:
            step = read = _reading(model, holder, size)
            held = held_bytes(read())
        else:
            cache = _fill(model, holder, size)
            held, step = held_bytes(cache), _decoding(model, cache, size.batch)
            step()  # what does not run shows here
        wait = synchronizer(model.device)
        case = case_of(name, step, prepare=serve, warm=not reads, wait=wait)
        facts = Facts(
            name=name,
            kind=kind,
            context_tokens=size.context_tokens,
            batch=size.batch,
            threads=size.threads,
            fill="prompt" if reads else size.fill,
            kv_bytes=held,
            weights_bytes=weights_bytes(model),
            read_bytes=None if reads else step_weight_bytes(model) + held,
            **{"weights": dtype_words(model), **told},
        )
        return Ready(case, facts)

    return Entry(name, kind, make, needs_bytes)


def prompt_timing(model: PreTrainedModel, holder: Holder, size: Size, repeats: int) -> Timing:
    """Reading one prompt of `size`, so many times in a row."""
    _serve(model, holder, size.threads)
    step, wait = _reading(model, holder, size), synchronizer(model.device)
    return Timing.of(Samples([stopwatch(step, 1, wait) for _ in range(repeats)]))


def held_bytes(cache: Cache) -> int:
    """Bytes of every tensor of a cache, quantized parts of transformers' own included."""
    if callable(getattr(cache, "nbytes", None)):
        return cache_bytes(cache)
    return caches.storage_bytes(cache.layers)


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads: all but an input embedding of its own."""
    total = weights_bytes(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {t.data_ptr(): t.nbytes for t in embedding.state_dict().values()}
    shared = set() if head is None else {t.data_ptr() for t in head.state_dict().values()}
    return total - sum(size for at, size in own.items() if at not in shared)


def dtype_words(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def synchronizer(device: torch.device) -> Callable[[], object] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def _decoding(model: PreTrainedModel, cache: Cache, batch: int) -> Callable[[], object]:
    token = torch.full((batch, 1), _FIRST_ID, device=model.device)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=token, **as_argument(cache), use_cache=True, logits_to_keep=1)

    return step


def _reading(model: PreTrainedModel, holder: Holder, size: Size) -> Callable[[], Cache]:
    """A forward over a prompt of random ids, which gives the cache."""
    generator = torch.Generator().manual_seed(2)
    embedding: Any = model.get_input_embeddings()
    vocabulary: int = embedding.weight.shape[0]
    shape = (size.batch, size.context_tokens)
    ids = torch.randint(_FIRST_ID, vocabulary, shape, generator=generator).to(model.device)

    @torch.inference_mode()
    def read() -> Cache:
        cache = holder.empty(size.context_tokens + size.room_tokens)
        model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
        finish = getattr(cache, "finish_prompt", None)
        if finish is not None:
            finish(model)
        return cache

    return read


def _fill(model: PreTrainedModel, holder: Holder, size: Size) -> Cache:
    if size.fill == "prompt":
        return _reading(model, holder, size)()
    shape = model_shape(model)
    pair = caches.random_pair(
        size.batch, shape.kv_heads, size.context_tokens, shape.head_dim, model.dtype
    )
    pair = (pair[0].to(model.device), pair[1].to(model.device))
    with torch.no_grad():
        return holder.filled(pair, size.room_tokens)


def _serve(model: PreTrainedModel, holder: Holder, threads: int) -> None:
    """Have the model serve caches of `holder`, with so many threads."""
    from kvcompress.runtime.hf.attach import attach, detach
    from kvcompress.runtime.model.attached import attached

    use_threads(threads)
    now = attached(model)
    if holder.plan is None:
        detach(model)
    elif now is None or now[0] is not holder.plan or now[1] is not holder.params:
        attach(model, holder.plan, holder.params)
