"""Attention over what a layer holds and the tokens that arrive, and the scores that it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import Partial, decode_split
from kvcompress.quant.codec import Codes
from kvcompress.runtime.state import Group, LayerState
from kvcompress.runtime.store import Bucket

QUERY_BLOCK: int = 128  # rows of queries at a time: memory is O(block · keys), never O(T · keys)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that arrive together in one forward.

    Attributes:
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, T, D]``.
        position: position of the chunk's first token, pads counted.
        mask: ``[B, 1, T, T]`` bool, True where a query may see a key of the chunk; None is causal.
        valid: ``[B, T]`` bool, False for padding; None if there is none.
        flags: ``[B, T]`` uint8 class flags, or None.
        scaling, softcap: of the softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position: int
    mask: Tensor | None
    valid: Tensor | None
    flags: Tensor | None
    scaling: float
    softcap: float | None

    @property
    def length(self) -> int:
        return self.query.shape[2]


def attend(state: LayerState, chunk: Chunk) -> tuple[Tensor, dict[int, Tensor]]:
    """Exact attention of the chunk over [what is stored ; the chunk].

    Scores of stored and recent tokens are raised in place.

    Returns:
        The output ``[B, Hq, T, D]`` in the query's dtype, and for each scored group (by its index)
        the chunk's own score ``[B, Hg, T]``.
    """
    batch, q_heads, length, _ = chunk.query.shape
    heads = chunk.key.shape[1]
    out = chunk.query.new_empty(batch, q_heads, length, chunk.value.shape[-1])
    scores = new_scores(state, chunk)
    for low in range(0, length, QUERY_BLOCK):
        rows = slice(low, min(length, low + QUERY_BLOCK))
        block = _attend_rows(state, chunk, rows, scores)
        out[:, :, rows] = block.reshape(
            batch, heads, -1, rows.stop - rows.start, block.shape[-1]
        ).flatten(1, 2)
    return out, scores


def score_rows(state: LayerState, chunk: Chunk, first: int) -> dict[int, Tensor]:
    """Only the scores of `attend`, from the chunk's rows `first` and later."""
    scores = new_scores(state, chunk)
    for low in range(first, chunk.length, QUERY_BLOCK):
        _attend_rows(state, chunk, slice(low, min(chunk.length, low + QUERY_BLOCK)), scores)
    return scores


def new_scores(state: LayerState, chunk: Chunk) -> dict[int, Tensor]:
    """The score that each token of the chunk starts with, per scored group."""
    scorer = state.settings.scorer
    length = chunk.length
    position = torch.arange(chunk.position, chunk.position + length, device=chunk.key.device)
    scores = {}
    for number, group in enumerate(state.groups):
        if group.recent_score is not None:
            key = chunk.key[:, group.index]
            head = group.index[None, :, None].expand(key.shape[:-1])
            scores[number] = scorer.initial(key, position.expand(key.shape[:-1]), head)
    return scores


def _attend_rows(state: LayerState, chunk: Chunk, rows: slice, scores: dict[int, Tensor]) -> Tensor:
    """Output ``[B, Hkv, G·n, D]`` float32 of the chunk's rows; query rows lie group-major."""
    batch, _, _, dim = chunk.query.shape
    heads = chunk.key.shape[1]
    query = chunk.query[:, :, rows].float() * chunk.scaling
    query = query.reshape(batch, heads, -1, dim)
    n = rows.stop - rows.start
    position = torch.arange(rows.start, rows.stop, device=query.device) + chunk.position
    combiner = Combiner(batch, heads, query.shape[2], chunk.value.shape[-1], query.device)
    everywhere = torch.cartesian_prod(
        torch.arange(batch, device=query.device), torch.arange(heads, device=query.device)
    ).unbind(-1)

    exact: Partial | None = None
    if any(state.row_seen):
        visible = _stored_visible(state, state.exact_position, position, query.shape[2])
        visible = visible.repeat_interleave(heads, 0)
        exact = _dense(query, state.exact_k, state.exact_v, visible, chunk.softcap)
        combiner.add(exact, *everywhere)
    coded = _attend_codes(state, query, position, chunk.softcap, combiner)
    own = _attend_chunk(chunk, query, rows, combiner, everywhere)
    if scores and state.settings.scorer.uses_attention:
        weight = _row_weights(state, chunk, position, rows, n)
        _raise_stored(combiner, coded, weight)
        _raise_exact(state, combiner, exact, own, weight, scores, everywhere)
    return combiner.output()


def _dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, softcap: float | None
) -> Partial:
    """A part that is held uncoded, ``[B, Hkv, C, D]``."""
    return decode_split(
        query.flatten(0, 1),
        None,
        Codes(key.flatten(0, 1), None, None),
        Codes(value.flatten(0, 1), None, None),
        "model",
        "model",
        visible,
        softcap,
    )


def _stored_visible(
    state: LayerState, position: Tensor, query_position: Tensor, rows: int
) -> Tensor:
    """``[S, 1 or rows, C]``: which stored tokens each query row may see."""
    visible = (position >= 0).unsqueeze(1)
    if state.settings.window is None:
        return visible
    first = query_position - state.settings.window
    inside = position.unsqueeze(1) > first.view(1, -1, 1)
    return (visible & inside).repeat(1, rows // query_position.shape[0], 1)


def _attend_codes(
    state: LayerState, query: Tensor, position: Tensor, softcap: float | None, combiner: Combiner
) -> list[tuple[Group, Bucket, Partial]]:
    """Add every coded segment; keeps the parts whose scores must be raised."""
    center, scale = state.settings.key_constants(query.device)
    scored = []
    for group in state.groups:
        for bucket in group.store.buckets():
            head = group.index[bucket.head]
            rows = query[bucket.batch, head]
            part = decode_split(
                rows * scale[head].unsqueeze(1),
                (rows * center[head].unsqueeze(1)).sum(-1),
                bucket.keys,
                bucket.values,
                group.store.kind.k_dtype,
                group.store.kind.v_dtype,
                _stored_visible(state, bucket.position, position, rows.shape[1]),
                softcap,
            )
            combiner.add(part, bucket.batch, head)
            if group.store.kind.scored:
                scored.append((group, bucket, part))
    return scored


def _attend_chunk(
    chunk: Chunk,
    query: Tensor,
    rows: slice,
    combiner: Combiner,
    everywhere: tuple[Tensor, ...],
) -> Partial:
    """Add the chunk's own keys, up to the last one that these rows may see."""
    batch, heads, total, _ = query.shape
    n = rows.stop - rows.start
    if chunk.mask is None:
        index = torch.arange(rows.stop, device=query.device)
        visible = (index[None, :] <= index[rows.start :, None])[None]
    else:
        visible = chunk.mask[:, 0, rows, : rows.stop]
    visible = visible[:, None, None].expand(batch, heads, total // n, n, rows.stop)
    part = _dense(
        query,
        chunk.key[:, :, : rows.stop],
        chunk.value[:, :, : rows.stop],
        visible.reshape(batch * heads, total, rows.stop),
        chunk.softcap,
    )
    combiner.add(part, *everywhere)
    return part


def _row_weights(state: LayerState, chunk: Chunk, position: Tensor, rows: slice, n: int) -> Tensor:
    """``[B, n]``: how much each query row's attention counts, the mean over a group's queries."""
    queries = chunk.query.shape[1] // chunk.key.shape[1]
    start = first_positions(state, chunk)
    weight = state.settings.scorer.row_weight(position[None, :] - start[:, None]) / queries
    weight = weight * (position[None, :] >= state.first_vote)
    if chunk.valid is not None:
        weight = weight * chunk.valid[:, rows]
    return weight.expand(chunk.query.shape[0], n)


def first_positions(state: LayerState, chunk: Chunk) -> Tensor:
    """``[B]`` position of each row's first real token, this chunk's included."""
    if chunk.valid is None:
        first = torch.full_like(state.start, chunk.position)
    else:
        first = chunk.valid.int().argmax(-1).to(torch.int32) + chunk.position
    return torch.where(state.start >= 0, state.start, first)


def _column_sums(probability: Tensor, weight: Tensor) -> Tensor:
    """``[S, C]`` from ``[S, G·n, C]`` and row weights ``[S, n]``."""
    n = weight.shape[-1]
    return torch.einsum("sgnc,sn->sc", probability.unflatten(1, (-1, n)), weight)


def _raise_stored(
    combiner: Combiner, coded: list[tuple[Group, Bucket, Partial]], weight: Tensor
) -> None:
    for group, bucket, part in coded:
        head = group.index[bucket.head]
        probability = combiner.probabilities(part.logits, bucket.batch, head)
        assert bucket.score is not None
        bucket.score += _column_sums(probability, weight[bucket.batch])


def _raise_exact(
    state: LayerState,
    combiner: Combiner,
    exact: Partial | None,
    own: Partial,
    weight: Tensor,
    scores: dict[int, Tensor],
    everywhere: tuple[Tensor, ...],
) -> None:
    """Raise the scores of the recent tokens in place and of the chunk in `scores`."""
    batch, heads = combiner.maximum.shape[:2]
    weight = weight.repeat_interleave(heads, 0)

    def sums(part: Partial) -> Tensor:
        probability = combiner.probabilities(part.logits, *everywhere)
        return _column_sums(probability, weight).unflatten(0, (batch, heads))

    chunk_sums = sums(own)
    recent_sums = None if exact is None else sums(exact)[:, :, state.recent]
    for number, score in scores.items():
        group = state.groups[number]
        score[:, :, : chunk_sums.shape[-1]] += chunk_sums[:, group.index]
        if recent_sums is not None and group.recent_score is not None:
            group.recent_score += recent_sums[:, group.index]
