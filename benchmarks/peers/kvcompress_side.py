"""kvcompress as a side of `situations`: its plans, and what every situation does with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import common as c
import torch
from common import Kept, Record, Setting
from torch import Tensor

import kvcompress
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.registry import SCORERS
from kvcompress.runtime.model.families import shape_of

EXACT: dict[str, Any] = {"k_dtype": "model", "v_dtype": "model"}
SINKS, RECENT = 4, 16  # tokens that every head keeps uncoded
RATIO = 0.5  # of the prompt, where a budget is a share


def budget(tokens: int | None, taken: int) -> Budget:
    """What is left of `tokens` when `taken` are kept anyway; None is half of the prompt on top."""
    return Budget(ratio=RATIO) if tokens is None else Budget(tokens=max(0, tokens - taken))


def window_votes(model: Any, tokens: int | None = None, **storage: str) -> Plan:
    """SnapKV's rule without pooling: the last rows vote, and stay themselves.

    Args:
        storage: k_dtype and v_dtype, the model's own by default.
    """
    parts = {"frequent": budget(tokens, c.WINDOW), "local": Budget(tokens=c.WINDOW)}
    return uniform(
        shape_of(model.config, model.dtype),
        HeadPlan.model_validate({**parts, **EXACT, **storage}),
        sink_tokens=0,
        recent_tokens=RECENT,
        scorer="raw",
        score_rows=c.WINDOW,
    )


def per_head(model: Any, *heads: HeadPlan, **settings: Any) -> Plan:
    """Different heads take turns, from head to head and from layer to layer."""
    shape = shape_of(model.config, model.dtype)
    fixed = {"sink_tokens": SINKS, "recent_tokens": RECENT}
    plan = uniform(shape, heads[0], **{**fixed, **settings})
    rows = tuple(
        tuple(heads[(layer + head) % len(heads)] for head in range(shape.heads_of(layer)))
        for layer in range(shape.layers)
    )
    return plan.model_copy(update={"heads": rows})


def frequent(tokens: int | None) -> HeadPlan:
    return HeadPlan(frequent=budget(tokens, SINKS + RECENT), **EXACT)


def local(tokens: int | None) -> HeadPlan:
    return HeadPlan(local=budget(tokens, SINKS), **EXACT)


def funnel(model: Any, context: int) -> Plan:
    """Fewer tokens from layer to layer."""
    plan = per_head(model, frequent(context // 2))
    budgets = (context * share // 10 for share in (8, 6, 4, 2))
    rows = tuple((frequent(tokens),) * plan.model.kv_heads for tokens in budgets)
    return plan.model_copy(update={"heads": rows})


def fastgen(model: Any, tokens: int) -> Plan:
    """Special tokens and punctuation on top of 3/4 of the budget."""
    parts = {"frequent": Budget(tokens=tokens // 2), "local": Budget(tokens=tokens // 4)}
    head = HeadPlan(special=True, punct=True, **parts, **EXACT)
    return per_head(model, head, special_ids=(30, 31), punct_ids=tuple(range(40, 60)))


def stored_as(dtype: str) -> Callable[[Any, Any], Plan]:
    return lambda m, t: window_votes(m, t, k_dtype=dtype, v_dtype=dtype)


# name → plan of a model whose heads hold so many tokens on average; None is a ratio of the prompt
PLANS: dict[str, Callable[[Any, Any], Plan]] = {
    "window votes": window_votes,
    "heavy hitters": lambda m, t: per_head(m, frequent(t), scorer="raw"),
    "lift": lambda m, t: per_head(m, frequent(t), scorer="lift"),
    "key norm": lambda m, t: per_head(m, frequent(t), scorer="key_norm"),
    "random": lambda m, t: per_head(m, frequent(t), scorer="random"),
    "sinks + recent": lambda m, t: per_head(m, local(t)),
    "per head 80/20": lambda m, t: per_head(
        m, frequent(t * 8 // 5), frequent(t * 2 // 5), scorer="raw"
    ),
    "per head full/streaming": lambda m, t: per_head(
        m, HeadPlan(full=True, **EXACT), local(SINKS + c.WINDOW)
    ),
    "FastGen classes": fastgen,
    "window votes, int8": stored_as("int8"),
    "window votes, int4": stored_as("int4"),
}
SIMPLE = ("window votes", "key norm", "sinks + recent")
PER_HEAD = ("per head 80/20", "per head full/streaming", "FastGen classes")
NAME, KEY_NORM, VOTES, TAKES_CACHES = "kvcompress", "key norm", "window votes", False
METHOD_COUNT = len(SCORERS)
VERSIONED = [*PLANS]
SECOND_TURN = ("window votes", "per head 80/20")
TOLD_APART = ("window votes", *PER_HEAD)
IN_FAMILIES = ("key norm", "window votes", "per head 80/20")
QUANTIZED_WEIGHTS = ("window votes", "key norm", "per head 80/20")
EAGER = ("window votes", "key norm", "heavy hitters", "per head 80/20")
PER_LAYER: dict[str, Callable[[Any, Any], Plan]] = {"": lambda m, s: funnel(m, s.context)}
OFFLINE = PLANS


def method(model: Any, name: str, tokens: int | None = None) -> Plan:
    return PLANS[name](model, tokens)


@contextmanager
def serving(model: Any, plan: Plan) -> Iterator[None]:
    """A block in which the model compresses."""
    kvcompress.attach(model, plan)
    yield


def compressed(model: Any, plan: Plan, ids: Tensor) -> Any:
    """The cache after the prompt `ids` under `plan`, which the model keeps."""
    cache = start(model, plan)
    c.feed(model, cache, ids, [0, ids.shape[1]])
    return cache


def tokens_by_layer(cache: Any, kept: list[Kept | None], added: int) -> list[int]:
    """After the prompt."""
    return [int(k.sum(-1).max()) for k in kept[1] or [] if k is not None]


def after_the_prompt(kept: list[Kept | None]) -> Kept:
    return kept[1] or []


def kept_of(cache: Any, seen: int) -> Kept:
    """Per layer ``[B, H, seen]``: the positions that the cache holds now."""
    result: Kept = []
    for layer in cache.layers:
        state = layer.state
        batch, heads = state.exact_k.shape[:2]
        allowed = torch.zeros(batch, heads, seen, dtype=torch.bool)
        row = torch.arange(batch)[:, None].expand_as(state.exact_position)
        real = state.exact_position >= 0
        allowed[row[real], :, state.exact_position[real].long()] = True
        for group in state.groups:
            row, head = group.store.segment_of_slot()
            real = group.store.position >= 0
            position = group.store.position[real].long()
            allowed[row[real], group.index[head[real]], position] = True
        result.append(allowed)
    return result


def tokens_held(cache: Any, seen: int) -> list[int]:
    """Most tokens that a head holds, per layer."""
    return [int(k.sum(-1).max()) for k in kept_of(cache, seen) if k is not None]


def start(model: Any, plan: Plan, **options: Any) -> Any:
    """An empty cache of a model that has `plan`."""
    kvcompress.attach(model, plan)
    return kvcompress.new_cache(model, **options)


def after_prompt(
    model: Any,
    plan: Plan,
    ids: Tensor,
    bounds: Sequence[int],
    mask: Tensor | None = None,
    positions: bool = True,
    cache: None = None,
) -> tuple[Any, list[Tensor], list[Kept | None], float]:
    """Compress ``ids[:, :bounds[1]]`` and go on.

    Returns:
        The cache, the logits of the later chunks, what was kept before each chunk, and the error
        of the logits against −inf masks over the same kept sets.
    """
    own = start(model, plan)
    kept: list[Kept | None] = []

    def note(number: int) -> None:
        kept.append(kept_of(own, bounds[number]) if number else None)

    logits = c.feed(model, own, ids, bounds, mask, positions, note)[1:]
    kvcompress.detach(model)
    expected = c.reference(model, ids, bounds, kept, mask)[1:]
    return own, logits, kept, c.gap(logits, expected)


def by_generate(setting: Setting) -> Record:
    model, ids, bounds = c.standard(setting)
    plan = PLANS["key norm"](model, setting.kept)
    kvcompress.attach(model, plan)
    out = c.generation(model, ids[:, : setting.context], setting.steps)
    _, _, kept, _ = after_prompt(model, plan, out.sequences, bounds)
    expected = c.reference(model, out.sequences, bounds, kept)
    return {"gap": c.gap([x[:, None] for x in out.logits[1:]], expected[1:])}
