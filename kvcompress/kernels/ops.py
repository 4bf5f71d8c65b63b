"""The kernels of a decode step as operators of torch, so that a compiled graph takes them whole.

Each calls the Triton kernel of its name, with codes spelled out tensor by tensor: a row of numbers,
a scale, a minimum, the last two None where the storage has none. Arguments are those of the
references. Triton is imported when one first runs.
"""

import torch
from torch import Tensor

from kvcompress.quant.codec import Codes


@torch.library.custom_op(
    "kvcompress::decode_split", mutates_args=("accumulated", "maximum", "total", "logits")
)
def decode_split(
    query: Tensor,
    heads: Tensor,
    center: Tensor,
    key_scale: Tensor,
    k_data: Tensor,
    k_scale: Tensor | None,
    k_minimum: Tensor | None,
    v_data: Tensor,
    v_scale: Tensor | None,
    v_minimum: Tensor | None,
    k_dtype: str,
    v_dtype: str,
    position: Tensor,
    work: Tensor,
    start: Tensor,
    seen: Tensor,
    accumulated: Tensor,
    maximum: Tensor,
    total: Tensor,
    logits: Tensor | None,
    first_work: int,
    scaling: float,
    softcap: float,
    window: int,
    block: int,
    chunk: int,
) -> None:
    """`kvcompress.kernels.decode_split.triton`."""
    from kvcompress.kernels.decode_split import triton

    triton.decode_split(
        query,
        heads,
        center,
        key_scale,
        Codes(k_data, k_scale, k_minimum),
        Codes(v_data, v_scale, v_minimum),
        k_dtype,  # type: ignore[arg-type]
        v_dtype,  # type: ignore[arg-type]
        position,
        work,
        start,
        seen,
        accumulated,
        maximum,
        total,
        logits,
        first_work,
        scaling,
        softcap,
        window,
        block,
        chunk,
    )


@torch.library.custom_op("kvcompress::decode_combine", mutates_args=())
def decode_combine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    exact_position: Tensor,
    heads: Tensor,
    accumulated: Tensor,
    maximum: Tensor,
    total: Tensor,
    chunks: Tensor,
    start: Tensor,
    seen: Tensor,
    valid: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kvcompress.kernels.decode_combine.triton`."""
    from kvcompress.kernels.decode_combine import triton

    return triton.decode_combine(
        query,
        key,
        value,
        exact_k,
        exact_v,
        exact_position,
        heads,
        accumulated,
        maximum,
        total,
        chunks,
        start,
        seen,
        valid,
        sinks,
        scaling,
        softcap,
        window,
        block,
    )


@decode_combine.register_fake
def _(  # type: ignore[no-untyped-def]
    query, key, value, exact_k, exact_v, exact_position, heads, accumulated, maximum, *_
):
    batch, kv_heads, exact, _ = exact_k.shape
    rows = query.shape[1]
    group = rows // kv_heads
    return (
        query.new_empty(batch, 1, rows, exact_v.shape[-1]),
        maximum.new_empty(batch, kv_heads, group),
        maximum.new_empty(batch, kv_heads, group, exact + 1),
    )


@torch.library.custom_op(
    "kvcompress::row_advance",
    mutates_args=("exact_position", "exact_class", "row_seen", "start", "class_counts"),
)
def row_advance(
    exact_position: Tensor,
    exact_class: Tensor | None,
    row_seen: Tensor,
    start: Tensor,
    class_counts: Tensor | None,
    seen: Tensor,
    valid: Tensor | None,
    flags: Tensor | None,
    budget: Tensor,
    cap: Tensor,
    capacity: Tensor,
    bits: Tensor,
    spans: Tensor | None,
    sink_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`kvcompress.kernels.row_advance.triton`."""
    from kvcompress.kernels.row_advance import triton

    return triton.row_advance(
        exact_position,
        exact_class,
        row_seen,
        start,
        class_counts,
        seen,
        valid,
        flags,
        budget,
        cap,
        capacity,
        bits,
        spans,
        sink_tokens,
    )


@row_advance.register_fake
def _(  # type: ignore[no-untyped-def]
    exact_position, exact_class, row_seen, start, class_counts, seen, valid, flags, budget, *_
):
    return seen.new_empty(exact_position.shape[0], 3), torch.empty_like(budget)


@torch.library.custom_op("kvcompress::score_select", mutates_args=("score",))
def score_select(
    logits: Tensor | None,
    lse: Tensor,
    score: Tensor | None,
    position: Tensor,
    work: Tensor,
    base: Tensor,
    granted: Tensor,
    windows: Tensor,
    bits: Tensor,
    start: Tensor,
    seen: Tensor,
    first_vote: Tensor,
    valid: Tensor | None,
    spans: Tensor | None,
    first_head: int,
    vote: str,
    mean: bool,
    window: int,
    block: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`kvcompress.kernels.score_select.triton`."""
    from kvcompress.kernels.score_select import triton

    return triton.score_select(
        logits,
        lse,
        score,
        position,
        work,
        base,
        granted,
        windows,
        bits,
        start,
        seen,
        first_vote,
        valid,
        spans,
        first_head,
        vote,
        mean,
        window,
        block,
        chunk,
    )


@score_select.register_fake
def _(logits, lse, score, position, work, base, granted, windows, bits, start, seen, *_):  # type: ignore[no-untyped-def]
    return lse.new_empty(work.shape[0]), seen.new_empty(work.shape[0])


@torch.library.custom_op(
    "kvcompress::kv_append",
    mutates_args=(
        *("exact_k", "exact_v", "k_data", "k_scale", "k_minimum", "v_data", "v_scale"),
        *("v_minimum", "position", "score", "recent_score"),
    ),
)
def kv_append(
    key: Tensor,
    value: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    heads: Tensor,
    center: Tensor,
    key_scale: Tensor,
    k_data: Tensor,
    k_scale: Tensor | None,
    k_minimum: Tensor | None,
    v_data: Tensor,
    v_scale: Tensor | None,
    v_minimum: Tensor | None,
    k_dtype: str,
    v_dtype: str,
    position: Tensor,
    score: Tensor | None,
    recent_score: Tensor | None,
    initial: Tensor | None,
    exact_logits: Tensor,
    lse: Tensor,
    notes: Tensor,
    granted: Tensor,
    rank: Tensor,
    slot: Tensor,
    chunks: Tensor,
    windows: Tensor,
    bits: Tensor,
    start: Tensor,
    seen: Tensor,
    first_vote: Tensor,
    valid: Tensor | None,
    spans: Tensor | None,
    first_head: int,
    own_heads: int,
    first_work: int,
    sink_tokens: int,
    vote: str,
    mean: bool,
    window: int,
    block: int,
) -> None:
    """`kvcompress.kernels.kv_append.triton`."""
    from kvcompress.kernels.kv_append import triton

    triton.kv_append(
        key,
        value,
        exact_k,
        exact_v,
        heads,
        center,
        key_scale,
        Codes(k_data, k_scale, k_minimum),
        Codes(v_data, v_scale, v_minimum),
        k_dtype,  # type: ignore[arg-type]
        v_dtype,  # type: ignore[arg-type]
        position,
        score,
        recent_score,
        initial,
        exact_logits,
        lse,
        notes,
        granted,
        rank,
        slot,
        chunks,
        windows,
        bits,
        start,
        seen,
        first_vote,
        valid,
        spans,
        first_head,
        own_heads,
        first_work,
        sink_tokens,
        vote,
        mean,
        window,
        block,
    )
