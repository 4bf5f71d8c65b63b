"""Layers that cache one latent per token (MLA, arXiv 2405.04434, section 2.1).

The model hands its latent and its rotated key part to the cache and expands whatever comes back
into keys and values of every query head. So a layer has one "KV head", the latent; tokens are kept
or dropped for all query heads at once, and a token's score is the mean over all of them. What is
stored is decoded for each forward: the codes save memory here, not reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split.reference import decode_split
from kvcompress.quant.codec import Codes
from kvcompress.runtime.layer.layer import CompressedLayer, FastAttention
from kvcompress.runtime.store.attend import QUERY_BLOCK, Chunk, chunk_visible, voting_rows
from kvcompress.runtime.store.segments import EMPTY, Bucket
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.runtime.torch_modes import leaving_plain_tensors


class LatentLayer(CompressedLayer):
    """`update` gives the stored latents, then the chunk's own; `forward` sees them expanded."""

    _latents: tuple[Tensor, Tensor]
    _expanded: tuple[Tensor, Tensor]
    _stored_position: Tensor | None = None

    def __init__(
        self,
        settings: LayerSettings,
        spans: list[tuple[range, ...]] | tuple[range, ...] = (),
        hold_prompt: bool = False,
    ) -> None:
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
        super().__init__(settings, spans, hold_prompt)

    def _votes_late(self) -> bool:
        """Never: all rows vote as they come, also where a plan has sums estimated, because the
        attention of all of them is computed here in any case."""
        return False

    @property
    def _drafts_wait(self) -> bool:
        """The model expands the latents of a whole draft before any of it is stored."""
        return True

    @leaving_plain_tensors
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 1, T, R]`` and rotated key parts ``[B, 1, T, D]``, behind what is kept."""
        if self._prompt_is_over(key_states.shape[-2]):
            self.end_prefill()
        super().update(key_states, value_states)
        self._latents = (key_states.detach(), value_states.detach())
        parts = [self._latents]
        if self._pending is not None:
            parts.insert(0, (self._pending.chunk.key, self._pending.chunk.value))
        stored = self._stored(key_states, value_states)
        if stored is not None:
            parts.insert(0, stored)
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Exact slots, then decoded ones, padded to the longest row; None of an empty layer."""
        state = self.state
        assert state is not None
        self._stored_position = None
        if not any(state.row_seen):
            return None
        keys, values = [state.exact_k], [state.exact_v]
        positions = [state.exact_position]
        center, scale = self.settings.key_constants(key.device)
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

    @leaving_plain_tensors
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        fast_attention: FastAttention,
        sinks: Tensor | None = None,
        reader: int | None = None,
    ) -> Tensor:
        """As `CompressedLayer.forward`, over expanded keys and values ``[B, Hq, S + P + T, D]``."""
        self._given = None
        chunk = self._chunk(query, *self._latents, mask, scaling, softcap, sinks)
        self._note_turn(chunk)
        self._expanded = (key, value)
        out = self._take(chunk, fast_attention)
        del self._expanded, self._latents
        return out

    def _attend(
        self, chunk: Chunk, scores: dict[int, Tensor], fast_attention: FastAttention
    ) -> Tensor:
        state = self.state
        assert state is not None
        self._set_first_vote(chunk)
        if self._stored_position is None and not chunk.held and not scores and fast_attention:
            return fast_attention()
        out = chunk.query.new_empty(*chunk.query.shape[:3], self._expanded[1].shape[-1])
        for low in range(0, chunk.length, QUERY_BLOCK):
            rows = slice(low, min(chunk.length, low + QUERY_BLOCK))
            out[:, :, rows] = self._attend_rows(chunk, rows, scores)
        return out.transpose(1, 2).contiguous()

    def _attend_rows(self, chunk: Chunk, rows: slice, scores: dict[int, Tensor]) -> Tensor:
        """``[B, Hq, n, Dv]`` of some query rows, whose votes are added."""
        state = self.state
        assert state is not None
        key, value = self._expanded
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
        if scores and self.settings.scorer.uses_attention:
            position = torch.arange(rows.start, rows.stop, device=key.device) + chunk.position
            weight = voting_rows(state, chunk, position, rows).weight
            share = combiner.probabilities(part.logits, *grid).unflatten(0, (batch, heads))
            self._vote(torch.einsum("bhnc,bn->bc", share, weight), stored, scores)
        return combiner.output()

    def _vote(self, sums: Tensor, stored: int, scores: dict[int, Tensor]) -> None:
        """Raise the scores of stored tokens and of the chunk by ``[B, S + P + T]``."""
        state = self.state
        assert state is not None
        for number, score in scores.items():
            group = state.groups[number]
            score[:, 0, : sums.shape[1] - stored] += sums[:, stored:]
            if not stored:
                continue
            assert group.recent_score is not None
            exact = self.settings.exact_tokens
            group.recent_score[:, 0] += sums[:, self.settings.sink_tokens : exact]
            for bucket in group.store.buckets():
                _raise(bucket, sums[:, exact:stored])


def _raise(bucket: Bucket, sums: Tensor) -> None:
    assert bucket.score is not None
    bucket.score += sums[bucket.batch, : bucket.capacity]
