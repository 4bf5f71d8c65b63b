"""Layers that cache one latent per token (MLA, arXiv 2405.04434, section 2.1).

The model hands its latent and its rotated key part to the cache and expands whatever comes back
into keys and values of every query head. So a layer has one "KV head", the latent; tokens are kept
or dropped for all query heads at once, and a token's score is the mean over all of them. What is
stored is decoded for each forward: the codes save memory here, not reading.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import decode_split
from kvcompress.quant.codec import Codes
from kvcompress.runtime.layer.attention import AbstractAttention, Pair, set_first_vote
from kvcompress.runtime.layer.call import AttentionCall, Progress
from kvcompress.runtime.layer.layer import CompressedLayer, Spans
from kvcompress.runtime.layer.pending_chunk import PendingChunk
from kvcompress.runtime.layer.ready import Ready
from kvcompress.runtime.prompt.score_queries import LateScoreQueries
from kvcompress.runtime.store.attend import QUERY_BLOCK, Chunk, chunk_visible, voting_rows
from kvcompress.runtime.store.segments import EMPTY
from kvcompress.runtime.store.state import LayerSettings, LayerState
from kvcompress.runtime.torch_modes import leaving_plain_tensors


def latent_layer(
    settings: LayerSettings, spans: Spans = (), hold_prompt: bool = False
) -> CompressedLayer:
    """A layer of latents; arguments as for `CompressedLayer`.

    Raises:
        KVCompressError: for a plan that latents cannot follow.
    """
    last_alone = settings.plan.score_rows is not None and settings.plan.score_stride is None
    if hold_prompt and last_alone:
        raise KVCompressError(
            "a plan with score_rows cannot hold the prompts of latent layers: which rows vote "
            "is known only when their keys are gone; use compress='per_chunk'"
        )
    found, rule = settings.scorer, settings.plan.per_request
    if found.needs or found.finishes or not found.adds_up or rule is not None:
        raise KVCompressError(
            f"latent layers rank by weighted attention sums alone, the plan by {found.name!r}"
            f"{' with a rule for each request' if rule is not None else ''}; use the scorer "
            "raw, mean, lift, random or key_norm, and no per_request"
        )
    return CompressedLayer(settings, spans, hold_prompt, _begin)


def _begin(
    settings: LayerSettings,
    first: Pair,
    spans: list[tuple[range, ...]],
    hold_prompt: bool,
    progress: Progress,
) -> Ready:
    state = LayerState.empty(settings, *first, spans)
    return Ready(state, hold_prompt, progress, LatentAttention())


@final
class LatentAttention(AbstractAttention):
    """The model is shown the stored latents, then the chunk's own, and attends over them expanded.

    All rows vote as they come, also where a plan has sums estimated, because the attention of all
    of them is computed here in any case.
    """

    expands = True

    def __init__(self) -> None:
        self._stored_position: Tensor | None = None

    @leaving_plain_tensors
    def shown(self, state: LayerState, held: PendingChunk | None, chunk: Pair) -> Pair:
        """Latents ``[B, 1, S + P + T, R]`` and rotated key parts ``[B, 1, S + P + T, D]``."""
        parts = [(chunk[0].detach(), chunk[1].detach())]
        if held is not None:
            parts.insert(0, (held.chunk.key, held.chunk.value))
        stored = self._stored(state, *chunk)
        if stored is not None:
            parts.insert(0, stored)
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    def to_store(self, call: AttentionCall, given: Pair, layer: int, first: bool) -> Pair:
        return given

    def _stored(self, state: LayerState, key: Tensor, value: Tensor) -> Pair | None:
        """Exact slots, then decoded ones, padded to the longest row; None of an empty layer."""
        self._stored_position = None
        if not any(state.row_seen):
            return None
        keys, values = [state.exact_k], [state.exact_v]
        positions = [state.exact_position]
        center, scale = state.key_constants()
        for store in (group.store for group in state.groups):
            longest = max(c for row in store.capacities for c in row)
            k = key.new_zeros(state.batch, 1, longest, key.shape[-1])
            v = value.new_zeros(state.batch, 1, longest, value.shape[-1])
            p = torch.full((state.batch, longest), EMPTY, dtype=torch.int32, device=key.device)
            for bucket in store.buckets():
                coded, other = store.decoded(bucket)
                k[bucket.batch, 0, : bucket.capacity] = (coded * scale[0] + center[0]).to(k.dtype)
                v[bucket.batch, 0, : bucket.capacity] = other.to(v.dtype)
                p[bucket.batch, : bucket.capacity] = bucket.position
            keys.append(k)
            values.append(v)
            positions.append(p)
        self._stored_position = torch.cat(positions, 1)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def attend(
        self,
        state: LayerState,
        chunk: Chunk,
        scores: dict[int, Tensor],
        call: AttentionCall,
        late: LateScoreQueries | None,
    ) -> Tensor:
        """Over expanded keys and values ``[B, Hq, S + P + T, D]``."""
        set_first_vote(state, chunk)
        if self._stored_position is None and not chunk.held and not scores and call.fast:
            return call.fast()
        out = chunk.query.new_empty(*chunk.query.shape[:3], call.value.shape[-1])
        for low in range(0, chunk.length, QUERY_BLOCK):
            rows = slice(low, min(chunk.length, low + QUERY_BLOCK))
            out[:, :, rows] = self._attend_rows(state, chunk, rows, scores, call)
        return out.transpose(1, 2).contiguous()

    def _attend_rows(
        self,
        state: LayerState,
        chunk: Chunk,
        rows: slice,
        scores: dict[int, Tensor],
        call: AttentionCall,
    ) -> Tensor:
        """``[B, Hq, n, Dv]`` of some query rows, whose votes are added."""
        key, value = call.key, call.value
        batch, heads = key.shape[:2]
        n = rows.stop - rows.start
        visible = chunk_visible(state, chunk, rows).expand(batch, -1, -1)
        before = self._stored_position
        stored = 0 if before is None else before.shape[1]
        stop = stored + visible.shape[-1]
        if before is not None:
            visible = torch.cat([(before >= 0)[:, None].expand(-1, n, -1), visible], -1)
        part = decode_split(
            (chunk.query[:, :, rows].float() * chunk.scaling).flatten(0, 1),
            None,
            Codes(key[:, :, :stop].flatten(0, 1), None, None),
            Codes(value[:, :, :stop].flatten(0, 1), None, None),
            "model",
            "model",
            visible.repeat_interleave(heads, 0),
            chunk.softcap,
        )
        combiner = Combiner(batch, heads, n, value.shape[-1], key.device)
        grid = torch.cartesian_prod(
            torch.arange(batch, device=key.device), torch.arange(heads, device=key.device)
        ).unbind(-1)
        combiner.add(part, *grid)
        if chunk.sinks is not None:
            combiner.add_logits(chunk.sinks[:, None].expand(-1, n))
        if scores and state.settings.scorer.uses_attention:
            position = torch.arange(rows.start, rows.stop, device=key.device) + chunk.position
            weight = voting_rows(state, chunk, position, rows).weight
            share = combiner.probabilities(part.logits, *grid).unflatten(0, (batch, heads))
            _vote(state, torch.einsum("bhnc,bn->bc", share, weight), stored, scores)
        return combiner.output()


def _vote(state: LayerState, sums: Tensor, stored: int, scores: dict[int, Tensor]) -> None:
    """Raise the scores of stored tokens and of the chunk by ``[B, S + P + T]``."""
    exact = state.settings.exact_tokens
    for number, score in scores.items():
        group = state.groups[number]
        score[:, 0, : sums.shape[1] - stored] += sums[:, stored:]
        if not stored or group.recent_score is None:
            continue
        group.recent_score[:, 0] += sums[:, state.settings.sink_tokens : exact]
        for bucket in group.store.buckets():
            if bucket.score is not None:
                bucket.score += sums[bucket.batch, exact : exact + bucket.capacity]
