"""A model with one cache, ready to decode: what is timed, and the facts that stand beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from kvcompress.bench import caches
from kvcompress.bench.bandwidth import use_threads
from kvcompress.bench.caches import Pair
from kvcompress.bench.compressed import fill_compressed
from kvcompress.bench.result import Kind, Timing
from kvcompress.bench.timing import Case, Samples, case_of, stopwatch
from kvcompress.evaluate.quality import weights_bytes
from kvcompress.evaluate.serving import cache_bytes, model_shape
from kvcompress.plan import Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.names import as_argument

Fill = Literal["synthetic", "prompt"]
_FIRST_ID: Final = 3


@dataclass(frozen=True, slots=True)
class Facts:
    """What a row says of a case beside its timing; see `result.Row`."""

    name: str
    kind: Kind
    context_tokens: int
    batch: int
    weights: str
    kv_bytes: int
    weights_bytes: int
    read_bytes: int | None
    fill: Fill = "synthetic"
    process: Literal["shared", "own"] = "shared"
    prompt: Timing | None = None
    quality: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A case that has been set up.

    Attributes:
        close: lets its memory or its process go.
    """

    case: Case
    facts: Facts
    threads: int
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
        plan: that the model has attached while it is timed; None for transformers' own caches.
        empty: an empty cache for so many tokens in all.
        filled: a cache that holds ``pair`` in every layer, with room for so many tokens more.
    """

    plan: Plan | None
    params: KVParams | None
    empty: Callable[[int], Any]
    filled: Callable[[Pair, int], Any]


def dynamic_holder(config: Any) -> Holder:
    from transformers import DynamicCache

    return Holder(
        None,
        None,
        lambda tokens: DynamicCache(config=config),
        lambda pair, room: caches.dynamic(config, pair),
    )


def static_holder(config: Any) -> Holder:
    from transformers import StaticCache

    return Holder(
        None,
        None,
        lambda tokens: StaticCache(config=config, max_cache_len=tokens),
        lambda pair, room: caches.static(config, pair, room),
    )


def quantized_holder(config: Any, backend: str, bits: int | None) -> Holder:
    return Holder(
        None,
        None,
        lambda tokens: caches.quantized_empty(config, backend, bits),
        lambda pair, room: caches.quantized(config, pair, backend, bits),
    )


def compressed_holder(model: Any, plan: Plan, params: KVParams | None = None) -> Holder:
    from kvcompress.runtime.cache.new import new_cache

    return Holder(
        plan,
        params,
        lambda tokens: new_cache(model),
        lambda pair, room: fill_compressed(plan, params, pair),
    )


def decode_entry(
    name: str,
    kind: Kind,
    model: Any,
    holder: Holder,
    size: Size,
    *,
    weights: str | None = None,
    quality: str | None = None,
    detail: str = "",
    needs_bytes: int = 0,
) -> Entry:
    """One-token forwards of `model` on a cache of `size`."""

    def make() -> Ready:
        cache = _fill(model, holder, size)
        held = held_bytes(cache)
        token = torch.full((size.batch, 1), _FIRST_ID, device=model.device)

        @torch.inference_mode()
        def step() -> None:
            model(input_ids=token, **as_argument(cache), use_cache=True, logits_to_keep=1)

        _serve(model, holder, size.threads)
        step()  # what does not run shows here
        case = case_of(
            name,
            step,
            prepare=lambda: _serve(model, holder, size.threads),
            wait=synchronizer(model.device),
        )
        facts = Facts(
            name, kind, size.context_tokens, size.batch, weights or dtype_words(model),
            held, weights_bytes(model), step_weight_bytes(model) + held,
            fill=size.fill, quality=quality, detail=detail,
        )  # fmt: skip
        return Ready(case, facts, size.threads)

    return Entry(name, kind, make, needs_bytes)


def prompt_entry(
    name: str,
    kind: Kind,
    model: Any,
    holder: Holder,
    size: Size,
    *,
    weights: str | None = None,
    quality: str | None = None,
    detail: str = "",
) -> Entry:
    """Forwards over a whole prompt of random ids, each into a new cache."""

    def make() -> Ready:
        ids = random_ids(model, size)
        _serve(model, holder, size.threads)
        held = held_bytes(read_prompt(model, holder, ids, size))
        case = case_of(
            name,
            lambda: read_prompt(model, holder, ids, size),
            prepare=lambda: _serve(model, holder, size.threads),
            warm=False,
            wait=synchronizer(model.device),
        )
        facts = Facts(
            name, kind, size.context_tokens, size.batch, weights or dtype_words(model),
            held, weights_bytes(model), None, fill="prompt", quality=quality, detail=detail,
        )  # fmt: skip
        return Ready(case, facts, size.threads)

    return Entry(name, kind, make)


def prompt_timing(model: Any, holder: Holder, size: Size, repeats: int) -> Timing:
    """Reading one prompt of one row, so many times in a row."""
    one = Size(size.context_tokens, 1, size.room_tokens, size.threads, "prompt")
    ids = random_ids(model, one)
    _serve(model, holder, size.threads)
    wait = synchronizer(model.device)
    windows = [
        stopwatch(lambda: read_prompt(model, holder, ids, one), 1, wait) for _ in range(repeats)
    ]
    return Timing.of(Samples(windows))


@torch.inference_mode()
def read_prompt(model: Any, holder: Holder, ids: torch.Tensor, size: Size) -> Any:
    """The cache after a forward over `ids`."""
    cache = holder.empty(size.context_tokens + size.room_tokens)
    model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
    finish = getattr(cache, "finish_prompt", None)
    if finish is not None:
        finish(model)
    return cache


def random_ids(model: Any, size: Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (size.batch, size.context_tokens)
    return torch.randint(_FIRST_ID, vocabulary, shape, generator=generator).to(model.device)


def held_bytes(cache: Any) -> int:
    """Bytes of every tensor of a cache, quantized parts of transformers' own included."""
    if callable(getattr(cache, "nbytes", None)):
        return cache_bytes(cache)
    return caches.storage_bytes(cache.layers)


def step_weight_bytes(model: Any) -> int:
    """Bytes of the weights that a decode step reads: all but an input embedding of its own."""
    total = weights_bytes(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {t.data_ptr(): t.nbytes for t in embedding.state_dict().values()}
    shared = set() if head is None else {t.data_ptr() for t in head.state_dict().values()}
    return total - sum(size for at, size in own.items() if at not in shared)


def dtype_words(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def synchronizer(device: torch.device) -> Callable[[], object] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def _fill(model: Any, holder: Holder, size: Size) -> Any:
    if size.fill == "prompt":
        _serve(model, holder, size.threads)
        return read_prompt(model, holder, random_ids(model, size), size)
    shape = model_shape(model)
    pair = caches.random_pair(
        size.batch, shape.kv_heads, size.context_tokens, shape.head_dim, model.dtype
    )
    pair = (pair[0].to(model.device), pair[1].to(model.device))
    with torch.no_grad():
        return holder.filled(pair, size.room_tokens)


def _serve(model: Any, holder: Holder, threads: int) -> None:
    """Have the model serve caches of `holder`, with so many threads."""
    from kvcompress.runtime.hf.attach import attach, detach
    from kvcompress.runtime.model.attached import attached

    use_threads(threads)
    now = attached(model)
    if holder.plan is None:
        detach(model)
    elif now is None or now[0] is not holder.plan or now[1] is not holder.params:
        attach(model, holder.plan, holder.params)
