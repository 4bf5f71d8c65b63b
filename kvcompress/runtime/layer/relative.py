"""Cache-relative positions: the kept tokens of every head are numbered anew at every step.

Stored keys are turned by their frame f, the position id with which the model rotated them, and a
query by its frame F. Numbered by their rank r among what the head keeps (0 … n − 1, the query's own
token last), the logit is that of R(r_q) q · R(r_k) k: the query is turned by r_q − F and the key by
r_k − f. A model then never sees a distance larger than what is kept, however long the context.

Frames need no storage: the forward pre-hook numbers tokens from the row's first real one and stops
at `max_position` − 1, so a frame follows from the token's position.

Source: StreamingLLM, arXiv 2309.17453, section 3.2. Differs from the paper: any keep-set, heads
that keep different tokens, and codes that are turned after they are widened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from kvcompress.accounting import keeps_classes, sinks_of
from kvcompress.errors import PlanError, UnsupportedModelError
from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import TILE_ELEMENTS, Partial, decode_split
from kvcompress.plan import Budget, HeadPlan, Plan
from kvcompress.quant.codec import Codes, decode
from kvcompress.quant.keystats import Rotation
from kvcompress.runtime.model.rotation import angles, find_rotations, turn
from kvcompress.runtime.store.attend import Chunk, attend, first_positions, stored_visible
from kvcompress.runtime.store.segments import Bucket, Group
from kvcompress.runtime.store.state import LayerState

MAX_PART_TOKENS: Final = 512
LEAST_TILE_TOKENS: int = 64
_KINDS: Final = frozenset({"full", "sliding", "chunked", "linear", "none"})
_PROBE_SHARES: Final = (0.5, 0.3, 0.7)  # of the vocabulary: some ids have an embedding of zeros


# ---- which plans and models
def check_relative(plan: Plan, protected_tokens: int = 0) -> None:
    """Refuse a plan with relative positions that can outgrow `max_position` or cannot be numbered.

    Args:
        protected_tokens: tokens of a row that protected spans keep in every head.

    Raises:
        PlanError: with the layer and the reason, or the numbers.
    """
    for layer in range(plan.model.layers):
        kind = plan.model.kind(layer)
        if kind not in _KINDS:
            raise PlanError(
                f"relative positions: layer {layer} is a {kind} layer, whose keys the runtime "
                "cannot turn; use positions: original"
            )
    most = most_kept(plan, protected_tokens)
    if most + plan.recent_tokens > plan.max_position:
        raise PlanError(
            f"relative positions: a head keeps up to {most} tokens, and with {plan.recent_tokens} "
            f"new ones that is beyond max_position {plan.max_position}; keep at most "
            f"{plan.max_position - plan.recent_tokens}, sinks and recent tokens included"
        )


def most_kept(plan: Plan, protected_tokens: int = 0) -> int:
    """Most tokens that any head ever holds, sinks and recent tokens included.

    Raises:
        PlanError: for a head that keeps more the longer the context.
    """
    most = 0
    for layer, heads in enumerate(plan.heads):
        for number, head in enumerate(heads):
            coded = _most_coded(plan, layer, head, protected_tokens)
            if coded is None:
                raise PlanError(
                    f"relative positions: layer {layer}, head {number} ({head.label}) keeps more "
                    "tokens the longer the context; give budgets in tokens or with max_tokens, and "
                    "a cap to a head that keeps special tokens or punctuation"
                )
            most = max(most, sinks_of(plan, layer) + plan.recent_tokens + coded)
    return most


def _most_coded(plan: Plan, layer: int, head: HeadPlan, protected_tokens: int) -> int | None:
    window = plan.model.sliding_windows[layer]
    bounds = [] if window is None else [max(0, window - plan.recent_tokens)]
    if head.cap is not None:
        bounds.append(head.cap + protected_tokens)
    frequent, local = _most_of(head.frequent), _most_of(head.local)
    if not head.full and not keeps_classes(head) and frequent is not None and local is not None:
        bounds.append(frequent + max(0, local - plan.recent_tokens) + protected_tokens)
    return min(bounds, default=None)


def _most_of(budget: Budget | None) -> int | None:
    if budget is None:
        return 0
    return budget.max_tokens if budget.tokens is None else budget.tokens


def serving_rotations(model: Any, plan: Plan) -> tuple[Rotation | None, ...]:
    """The rotation of each layer, None where keys do not depend on their position.

    Raises:
        PlanError: as `check_relative`.
        UnsupportedModelError: where positions cannot be renumbered, with the layer and the reason.
    """
    if plan.positions == "relative":
        check_relative(plan)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    was_training = model.training
    model.eval()
    try:
        for share in _PROBE_SHARES:
            token = int(share * vocabulary)
            found = find_rotations(model, plan.model, token, plan.max_position - 1)
            if not any(layer.silent for layer in found):
                break
    finally:
        model.train(was_training)
    for number, layer in enumerate(found):
        if not layer.explained and plan.model.heads_of(number):
            raise UnsupportedModelError(
                f"{type(model).__name__}: relative positions up to max_position "
                f"{plan.max_position} turn keys, and in layer {number} "
                f"{layer.note.removeprefix('none: ')}; use positions: original, or a smaller "
                "max_position if the model changes its rotation with the length"
            )
    return tuple(layer.rotation for layer in found)


# ---- positions and parts of a forward
def row_starts(known: Tensor | None, mask: Tensor | None, seen: int, batch: int) -> Tensor:
    """``[B]`` int64 place of each row's first real token, pads counted.

    Args:
        known: `LayerState.start` of any layer, or None before the first forward.
        mask: the forward's 2-dimensional attention mask ``[B, seen + T]``, or None.
        seen: tokens that the cache has seen, pads counted.
    """
    if mask is not None:
        start = mask.ne(0).int().argmax(1)
    else:
        start = torch.full((batch,), seen, device=None if known is None else known.device)
    return start if known is None else torch.where(known >= 0, known.to(start), start)


def frame_positions(plan: Plan, start: Tensor, seen: int, length: int) -> Tensor:
    """Position ids ``[B, T]`` int64 with which the model has to rotate the next `length` tokens.

    They replace any that the caller gives: tokens are numbered by rank later on, so pads and holes
    in a mask play no part.

    Args:
        start: ``[B]``, see `row_starts`.
        seen: tokens that the cache has seen, pads counted.
    """
    place = torch.arange(seen, seen + length, device=start.device)
    return _frames(place[None, :], start.long()[:, None], plan)


def _frames(position: Tensor, start: Tensor, plan: Plan) -> Tensor:
    return (position - start).clamp(0, plan.max_position - 1)


def parts(plan: Plan, seen: int, length: int) -> list[tuple[int, int]]:
    """Where a chunk of `length` tokens is cut, so that no part shows a distance out of range.

    A chunk that fits beside all that a head may keep stays whole. Attending to the parts one after
    the other and storing each equals feeding them as chunks of a prompt.

    Args:
        seen: tokens before the chunk.
    """
    most = most_kept(plan)
    room = plan.max_position - (most if seen else 0)
    step = length if length <= room else min(MAX_PART_TOKENS, plan.max_position - most)
    return [(low, min(length, low + step)) for low in range(0, length, step)]


def in_order(state: LayerState, chunk: Chunk) -> bool:
    """Whether the frames of a chunk are its ranks, so that nothing has to be turned."""
    if any(state.row_seen) or chunk.position + chunk.length > state.settings.plan.max_position:
        return False
    return chunk.valid is None or bool((chunk.valid[:, 1:] >= chunk.valid[:, :-1]).all())


# ---- attention
def attend_relative(
    state: LayerState, chunk: Chunk, scores: dict[int, Tensor], rotation: Rotation | None
) -> Tensor:
    """As `attend`, with what each head keeps, and the chunk after it, numbered from 0.

    Args:
        chunk: rotated at `frame_positions`.
        rotation: of the layer; None if its keys do not depend on their position.
    """
    if rotation is None or in_order(state, chunk):
        return attend(state, chunk, scores)
    numbering = _Numbering.of(state, chunk, rotation)
    turned = replace(state, exact_k=numbering.exact_keys(state))
    out = attend(turned, numbering.chunk(chunk), scores, numbering.attend_coded)
    return out.to(chunk.query.dtype)


def order(position: Tensor) -> Tensor:
    """Rank of each slot ``[..., C]`` among the filled ones by position; empty slots come last."""
    last = torch.iinfo(position.dtype).max
    return position.masked_fill(position < 0, last).argsort(-1).argsort(-1)


@dataclass(frozen=True, slots=True)
class _Numbering:
    """Ranks and frames of what one forward attends over.

    Attributes:
        start: ``[B]`` place of the row's first real token.
        sinks: ``[B]`` sinks held.
        stored: ``[B, Hkv]`` tokens held, sinks and recent ones included.
    """

    rotation: Rotation
    plan: Plan
    start: Tensor
    sinks: Tensor
    stored: Tensor

    @staticmethod
    def of(state: LayerState, chunk: Chunk, rotation: Rotation) -> _Numbering:
        exact = state.exact_position >= 0
        stored = exact.sum(1)[:, None].repeat(1, chunk.key.shape[1])
        for group in state.groups:
            for bucket in group.store.buckets():
                where = (bucket.batch, group.index[bucket.head])
                stored[where] += (bucket.position >= 0).sum(1)
        start = first_positions(state, chunk).long()
        sinks = exact[:, : state.recent.start].sum(1)
        return _Numbering(rotation, state.settings.plan, start, sinks, stored)

    def turn(self, vectors: Tensor, rank: Tensor, position: Tensor, start: Tensor) -> Tensor:
        """`vectors` ``[..., D]`` in float32, turned from the frame of `position` to `rank`."""
        frame = _frames(position, start, self.plan)
        angle = angles(self.rotation, rank) - angles(self.rotation, frame)
        return turn(vectors.float(), angle, self.rotation)

    def exact_keys(self, state: LayerState) -> Tensor:
        """``[B, Hkv, sinks + recent, D]``."""
        oldest, newest = (
            state.exact_position[:, part] for part in (slice(state.recent.start), state.recent)
        )
        before = self.stored - (newest >= 0).sum(1)[:, None]
        newest_rank = before[:, :, None] + order(newest)[:, None]
        oldest_rank = order(oldest)[:, None].expand(-1, before.shape[1], -1)
        rank = torch.cat([oldest_rank, newest_rank], 2)
        position = state.exact_position[:, None]
        return self.turn(state.exact_k, rank, position, self.start[:, None, None])

    def chunk(self, chunk: Chunk) -> Chunk:
        """The chunk with its queries and keys turned, float32."""
        position = torch.arange(chunk.key.shape[2], device=chunk.key.device) + chunk.first
        own = (position - chunk.first)[None]
        if chunk.valid is not None:
            own = (chunk.valid.cumsum(1) - 1).clamp(min=0)
        rank = self.stored[:, :, None] + own[:, None]  # [B, Hkv, P + T]
        start = self.start[:, None, None]
        key = self.turn(chunk.key, rank, position, start)
        rank = rank[:, :, chunk.held :].repeat_interleave(
            chunk.query.shape[1] // chunk.key.shape[1], 1
        )
        query = self.turn(chunk.query, rank, position[chunk.held :], start)
        return replace(chunk, query=query, key=key)

    def attend_coded(
        self,
        state: LayerState,
        query: Tensor,
        position: Tensor,
        softcap: float | None,
        combiner: Combiner,
    ) -> list[tuple[Group, Bucket, Partial]]:
        """Add every coded segment, a tile at a time; gives the parts whose scores must be raised.

        Args:
            query: ``[B, Hkv, R, D]`` turned, times the softmax scale.
            position: ``[n]`` of the query rows.
        """
        center, scale = state.key_constants()
        scored = []
        for group in state.groups:
            kind = group.store.kind
            for bucket in group.store.buckets():
                row, head = bucket.batch, group.index[bucket.head]
                rank = self.sinks[row, None] + order(bucket.position)
                for tile, slots in _tiles(bucket, query.shape[-1]):
                    key = decode(tile.keys, kind.k_dtype, query.shape[-1])
                    key = key * scale[head, None] + center[head, None]
                    key = self.turn(key, rank[:, slots], tile.position, self.start[row, None])
                    part = decode_split(
                        query[row, head],
                        None,
                        Codes(key, None, None),
                        tile.values,
                        "model",
                        kind.v_dtype,
                        stored_visible(state, tile.position, row, position, query.shape[2]),
                        softcap,
                    )
                    combiner.add(part, row, head)
                    if kind.scored:
                        scored.append((group, tile, part))
        return scored


def _tiles(bucket: Bucket, dim: int) -> Iterator[tuple[Bucket, slice]]:
    """Views of a few slots of every segment, no more than fit in `TILE_ELEMENTS`."""
    step = max(LEAST_TILE_TOKENS, TILE_ELEMENTS // max(1, len(bucket.batch) * dim))
    for low in range(0, bucket.capacity, step):
        slots = slice(low, min(bucket.capacity, low + step))
        tile = replace(
            bucket,
            keys=bucket.keys.each(itemgetter((slice(None), slots))),
            values=bucket.values.each(itemgetter((slice(None), slots))),
            position=bucket.position[:, slots],
            score=None if bucket.score is None else bucket.score[:, slots],
        )
        yield tile, slots
