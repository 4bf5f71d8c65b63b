"""Attention over what a layer holds and the tokens that arrive, and the scores that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcompress.evict.keepset import PUNCT_SCORE
from kvcompress.evict.scorers import QueryRows
from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import Partial, decode_split
from kvcompress.quant.codec import Codes
from kvcompress.runtime.store.segments import EMPTY, Bucket, Group
from kvcompress.runtime.store.state import LayerState

QUERY_BLOCK: Final = 128  # rows of queries at a time: memory is O(block · keys), never O(T · keys)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that arrive together in one forward, behind any that are still held uncompressed.

    Attributes:
        query: ``[B, Hq, T, D]``, the queries of this forward.
        key, value: ``[B, Hkv, P + T, D]``, first those of the P held tokens.
        position: position of the first query, pads counted.
        mask: ``[B, 1, T, T]`` bool, True where a query may see a key of this forward; None is what
            the architecture lets it see.
        valid: ``[B, P + T]`` bool, False for padding; None if there is none.
        flags: ``[B, P + T]`` uint8 class flags, or None.
        scaling, softcap: of the softmax.
        sinks: ``[Hq]`` learned logits that join every softmax without a value, or None.
        norm: ``[B, T]`` norm of the attention module's input, where its queries vote on a prompt
            that is read again and the scorer wants to know; else None.
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
    sinks: Tensor | None = None
    norm: Tensor | None = None

    @property
    def length(self) -> int:
        """Queries, T."""
        return self.query.shape[2]

    @property
    def held(self) -> int:
        """Held tokens, P."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def first(self) -> int:
        """Position of the first key."""
        return self.position - self.held

    def tokens(self, low: int, high: int) -> Chunk:
        """Queries `low` to `high` alone, with their own keys; for a chunk without held tokens."""
        assert not self.held
        part = slice(low, high)
        return Chunk(
            self.query[:, :, part],
            self.key[:, :, part],
            self.value[:, :, part],
            self.position + low,
            None if self.mask is None else self.mask[:, :, part, part],
            None if self.valid is None else self.valid[:, part],
            None if self.flags is None else self.flags[:, part],
            self.scaling,
            self.softcap,
            self.sinks,
        )


# from (state, query [B, Hkv, R, D], positions of its rows, softcap, combiner)
CodedAttention = Callable[
    [LayerState, Tensor, Tensor, float | None, Combiner], list[tuple[Group, Bucket, Partial]]
]


def attend(
    state: LayerState,
    chunk: Chunk,
    scores: dict[int, Tensor],
    attend_coded: CodedAttention | None = None,
    voting: bool | None = None,
) -> Tensor:
    """Exact attention of the chunk over [what is stored ; held tokens ; the chunk].

    Scores of stored and recent tokens, and `scores` of the chunk's keys, are raised in place.

    Args:
        scores: for each scored group (by its index) ``[B, Hg, P + T]``, as
            `attention_inputs.new_scores` makes them.
        attend_coded: adds every coded segment; None reads the codes in place.
        voting: whether the chunk's queries vote; None is as the scorer says.

    Returns:
        The output ``[B, Hq, T, D]`` in the query's dtype.
    """
    batch, q_heads, length, _ = chunk.query.shape
    heads = chunk.key.shape[1]
    out = chunk.query.new_empty(batch, q_heads, length, chunk.value.shape[-1])
    voting = state.settings.scorer.uses_attention if voting is None else voting
    raised = scores if voting else {}
    for low in range(0, length, QUERY_BLOCK):
        rows = slice(low, min(length, low + QUERY_BLOCK))
        block = _attend_rows(state, chunk, rows, raised, attend_coded or _attend_codes)
        out[:, :, rows] = block.reshape(
            batch, heads, -1, rows.stop - rows.start, block.shape[-1]
        ).flatten(1, 2)
    return out


def score_rows(state: LayerState, chunk: Chunk, scores: dict[int, Tensor], first: int) -> None:
    """Only the scores of `attend`, from the chunk's rows `first` and later."""
    for low in range(first, chunk.length, QUERY_BLOCK):
        rows = slice(low, min(chunk.length, low + QUERY_BLOCK))
        _attend_rows(state, chunk, rows, scores, _attend_codes)


def _attend_rows(
    state: LayerState,
    chunk: Chunk,
    rows: slice,
    scores: dict[int, Tensor],
    attend_coded: CodedAttention,
) -> Tensor:
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
        row = torch.arange(batch, device=query.device)
        visible = stored_visible(state, state.exact_position, row, position, query.shape[2])
        visible = visible.repeat_interleave(heads, 0)
        exact = _dense(query, state.exact_k, state.exact_v, visible, chunk.softcap)
        combiner.add(exact, *everywhere)
    coded = attend_coded(state, query, position, chunk.softcap, combiner)
    own = _attend_chunk(state, chunk, query, rows, combiner, everywhere)
    if chunk.sinks is not None:
        combiner.add_logits(chunk.sinks.view(heads, -1, 1).expand(-1, -1, n).reshape(heads, -1))
    if scores:
        score_queries = voting_rows(state, chunk, position, rows)
        if n == 1 or bool(score_queries.weight.any()):
            _raise_stored(state, combiner, coded, score_queries)
            _raise_exact(state, combiner, exact, own, score_queries, scores, everywhere)
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


def stored_visible(
    state: LayerState, position: Tensor, row: Tensor, query_position: Tensor, rows: int
) -> Tensor:
    """``[S, 1 or rows, C]``: which stored tokens, of batch rows ``[S]``, each query row may see."""
    visible = (position >= 0).unsqueeze(1)
    start = state.start[row].view(-1, 1, 1)
    inside = state.settings.sees(query_position.view(1, -1, 1), position.unsqueeze(1), start)
    if inside is None:
        return visible
    return (visible & inside).repeat(1, rows // query_position.shape[0], 1)


def _attend_codes(
    state: LayerState, query: Tensor, position: Tensor, softcap: float | None, combiner: Combiner
) -> list[tuple[Group, Bucket, Partial]]:
    """Add every coded segment; keeps the parts whose scores must be raised."""
    center, scale = state.key_constants()
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
                stored_visible(state, bucket.position, bucket.batch, position, rows.shape[1]),
                softcap,
            )
            combiner.add(part, bucket.batch, head)
            if group.store.kind.scored:
                scored.append((group, bucket, part))
    return scored


def _attend_chunk(
    state: LayerState,
    chunk: Chunk,
    query: Tensor,
    rows: slice,
    combiner: Combiner,
    everywhere: tuple[Tensor, ...],
) -> Partial:
    """Add the held tokens and the chunk's own, up to the last one that these rows may see."""
    batch, heads, total, _ = query.shape
    n, stop = rows.stop - rows.start, chunk.held + rows.stop
    visible = chunk_visible(state, chunk, rows)
    visible = visible[:, None, None].expand(batch, heads, total // n, n, stop)
    part = _dense(
        query,
        chunk.key[:, :, :stop],
        chunk.value[:, :, :stop],
        visible.reshape(batch * heads, total, stop),
        chunk.softcap,
    )
    combiner.add(part, *everywhere)
    return part


def chunk_visible(state: LayerState, chunk: Chunk, rows: slice) -> Tensor:
    """``[B or 1, n, P + rows.stop]``: which keys of the chunk its query rows may see."""
    stop = chunk.held + rows.stop
    key = torch.arange(stop, device=chunk.key.device) + chunk.first
    query = key[chunk.held + rows.start :, None]
    visible = (key <= query)[None]
    inside = state.settings.sees(query, key, first_positions(state, chunk).view(-1, 1, 1))
    if inside is not None:
        visible = visible & inside
    if chunk.valid is not None:
        visible = visible & chunk.valid[:, None, :stop]
    if chunk.mask is not None:
        own = chunk.mask[:, 0, rows, : rows.stop]
        before = torch.ones_like(own[:, :, :1]).expand(-1, -1, chunk.held)
        visible = visible & torch.cat([before, own], -1)
    return visible


def voting_rows(state: LayerState, chunk: Chunk, position: Tensor, rows: slice) -> QueryRows:
    """How much each query row's attention counts, the mean over a group's queries, ``[B, n]``."""
    queries = chunk.query.shape[1] // chunk.key.shape[1]
    index = position[None, :] - first_positions(state, chunk)[:, None]
    weight = state.settings.scorer.row_weight(index) / queries
    weight = weight * (position[None, :] >= state.first_vote)
    if chunk.valid is not None:
        weight = weight * chunk.valid[:, chunk.held :][:, rows]
    shape = (chunk.query.shape[0], position.shape[0])
    norm = None if chunk.norm is None else chunk.norm[:, rows]
    return QueryRows(weight.expand(shape), index.expand(shape), position, norm)


def first_positions(state: LayerState, chunk: Chunk) -> Tensor:
    """``[B]`` int32 position of each row's first real token so far, −1 where it has none yet."""
    if chunk.valid is None:
        first = torch.full_like(state.start, chunk.first)
    else:
        first = chunk.valid.int().argmax(-1).to(torch.int32) + chunk.first
        first = first.masked_fill(~chunk.valid.any(-1), EMPTY)
    return torch.where(state.start >= 0, state.start, first)


def _said(state: LayerState, probability: Tensor, score_queries: QueryRows, row: Tensor) -> Tensor:
    """Votes ``[S, C]`` of query rows, from attention ``[S, G·n, C]`` of the batch rows ``[S]``."""
    norm = None if score_queries.norm is None else score_queries.norm[row]
    own = QueryRows(
        score_queries.weight[row], score_queries.index[row], score_queries.position, norm
    )
    heads = probability.unflatten(1, (-1, score_queries.position.shape[0]))
    return state.settings.scorer.collect(heads, own)


def merge_votes(state: LayerState, score: Tensor, votes: Tensor) -> Tensor:
    """`score` with `votes`; the scores of class tokens stay."""
    merged = state.settings.scorer.merge(score, votes)
    if state.settings.scorer.adds_up:
        return merged  # far below a class token's score
    return torch.where(score >= PUNCT_SCORE / 2, score, merged)


def _raise_stored(
    state: LayerState,
    combiner: Combiner,
    coded: list[tuple[Group, Bucket, Partial]],
    score_queries: QueryRows,
) -> None:
    for group, bucket, part in coded:
        head = group.index[bucket.head]
        probability = combiner.probabilities(part.logits, bucket.batch, head)
        votes = _said(state, probability, score_queries, bucket.batch)
        if state.settings.scorer.across_heads:
            # all heads of a row hold the same tokens in the same slots, see `Plan`
            heads = votes.unflatten(0, (-1, len(group.heads)))
            votes = heads.mean(1, keepdim=True).expand_as(heads).flatten(0, 1)
        assert bucket.score is not None
        bucket.score.copy_(merge_votes(state, bucket.score, votes))


def _raise_exact(
    state: LayerState,
    combiner: Combiner,
    exact: Partial | None,
    own: Partial,
    score_queries: QueryRows,
    scores: dict[int, Tensor],
    everywhere: tuple[Tensor, ...],
) -> None:
    """Raise the scores of the recent tokens in place and of the chunk in `scores`."""
    batch, heads = combiner.maximum.shape[:2]

    def said(part: Partial) -> Tensor:
        probability = combiner.probabilities(part.logits, *everywhere)
        votes = _said(state, probability, score_queries, everywhere[0]).unflatten(0, (batch, heads))
        if state.settings.scorer.across_heads:
            votes = votes.mean(1, keepdim=True).expand_as(votes)
        return votes

    of_chunk = said(own)
    of_recent = None if exact is None else said(exact)[:, :, state.recent]
    for number, score in scores.items():
        group, seen = state.groups[number], of_chunk.shape[-1]
        score[:, :, :seen] = merge_votes(state, score[:, :, :seen], of_chunk[:, group.index])
        if of_recent is not None and group.recent_score is not None:
            group.recent_score.copy_(
                merge_votes(state, group.recent_score, of_recent[:, group.index])
            )
