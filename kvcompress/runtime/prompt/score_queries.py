"""The attention of a first prompt and the votes of its rows, for scorers that add attention up.

    all rows vote                  one pass gives output and column sums
    the last rows vote             the model's own kernel, then these rows alone
    sums are estimated             the model's own kernel, which also tells the normaliser of every
                                   row; then near pairs, then the far pairs of the rows that vote
                                   for their stride, see `kvcompress.evict.score_queries`
A model without a kernel for its attention (soft caps, learned sinks), and a prompt that is held,
take the first way to their output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.evict.score_queries import far_weight, votes_for_its_stride
from kvcompress.kernels.prefill_colsum.cpu_torch import Sight, attend_with_sums, row_sums
from kvcompress.kernels.prefill_colsum.sdpa import attention_with_normaliser
from kvcompress.kernels.view import Softmax
from kvcompress.runtime.prompt import prompt_kernels
from kvcompress.runtime.store.attend import Chunk, first_positions, voting_rows
from kvcompress.runtime.store.state import LayerState


def attend_prompt(
    state: LayerState,
    chunk: Chunk,
    scores: dict[int, Tensor],
    fast_attention: Callable[[], Tensor] | None,
    late: LateScoreQueries | None,
) -> Tensor:
    """Attention of a first prompt, or of a part of one that is held; raises `scores` in place.

    Args:
        scores: for each scored group (by its index) ``[B, Hg, P + T]``.
        late: takes the queries that vote only when the prompt has ended, where it goes on, so that
            its last rows are not known yet; else None.

    Returns:
        ``[B, T, Hq, D]`` contiguous.
    """
    plan = state.settings.plan
    kernel = None if chunk.held else fast_attention
    if plan.score_stride is not None:
        return _estimated(state, chunk, scores, kernel is not None, late)
    weight = _weights(state, chunk)
    if plan.score_rows is None or kernel is None:
        sums_of = weight if bool(weight.any()) else None
        exact = None if kernel is None else _exact_on_gpu(state, chunk, sums_of)
        out, sums = exact or _dense(state, chunk, sums_of)[::2]
    else:
        out, sums = kernel(), None
        if late is None:
            first = max(0, chunk.length - plan.score_rows)
            sums = _sums(state, chunk, range(first, chunk.length), weight)
    if sums is not None:
        _raise(state, scores, sums)
    return out


def _estimated(
    state: LayerState,
    chunk: Chunk,
    scores: dict[int, Tensor],
    has_kernel: bool,
    late: LateScoreQueries | None,
) -> Tensor:
    found = None
    if has_kernel:
        mask = None if chunk.mask is None else chunk.mask.expand(len(chunk.query), -1, -1, -1)
        found = attention_with_normaliser(chunk.query, chunk.key, chunk.value, mask, chunk.scaling)
    out, normaliser = found or _dense(state, chunk, None)[:2]
    weight, (near, _) = _weights(state, chunk), _near_and_stride(state)
    _raise(state, scores, _sums(state, chunk, range(chunk.length), weight, near, normaliser))
    queries = LateScoreQueries() if late is None else late
    queries.note(state, chunk, normaliser)
    if late is None:
        queries.vote(state, chunk, scores)
    return out


def _exact_on_gpu(
    state: LayerState, chunk: Chunk, weight: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """Output and column sums by the kernels of a GPU; None where they do not serve the chunk."""
    if not _on_gpu(state, chunk):
        return None
    found = attention_with_normaliser(chunk.query, chunk.key, chunk.value, None, chunk.scaling)
    if found is None:
        return None
    out, normaliser = found
    if weight is None:
        return out, None
    return out, _sums(state, chunk, range(chunk.length), weight, normaliser=normaliser)


def _on_gpu(state: LayerState, chunk: Chunk) -> bool:
    """Whether rows see what their places alone say, on a device with kernels for it."""
    plain = state.settings.block is None and chunk.valid is None and chunk.mask is None
    return plain and prompt_kernels.triton_runs(chunk.query.device)


def _weights(state: LayerState, chunk: Chunk) -> Tensor:
    """``[B, T]`` weight of each row's attention."""
    rows = slice(0, chunk.length)
    position = torch.arange(chunk.length, device=chunk.query.device) + chunk.position
    return voting_rows(state, chunk, position, rows).weight


def _raise(state: LayerState, scores: dict[int, Tensor], sums: Tensor) -> None:
    """Add column sums ``[B, Hkv, P + T]``."""
    for number, score in scores.items():
        score += sums[:, state.groups[number].index]


def _near_and_stride(state: LayerState) -> tuple[int, int]:
    plan = state.settings.plan
    assert plan.score_rows is not None and plan.score_stride is not None
    return plan.score_rows, plan.score_stride


def _softmax(chunk: Chunk) -> Softmax:
    return Softmax(chunk.scaling, chunk.softcap, chunk.sinks)


def _dense(
    state: LayerState, chunk: Chunk, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output ``[B, T, Hq, D]``, normalisers ``[B, Hq, T]`` and column sums ``[B, Hkv, P + T]``."""
    batch, heads, length, _ = chunk.query.shape
    out = chunk.query.new_empty(batch, length, heads, chunk.value.shape[-1])
    normaliser = chunk.query.new_empty(batch, heads, length, dtype=torch.float32)
    place = torch.arange(length) + chunk.held
    sums = [
        attend_with_sums(
            chunk.query[b],
            chunk.key[b],
            chunk.value[b],
            _softmax(chunk),
            _sight(state, chunk, b, place),
            None if weight is None else weight[b],
            out[b],
            normaliser[b],
        )
        for b in range(batch)
    ]
    whole = [own for own in sums if own is not None]
    return out, normaliser, torch.stack(whole) if whole else None


def _sums(
    state: LayerState,
    chunk: Chunk,
    rows: range,
    weight: Tensor,
    most: int | None = None,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Column sums ``[B, Hkv, P + T]`` of the chunk's `rows`, over their `most` newest keys."""
    part = slice(rows.start, rows.stop)
    place = torch.arange(rows.start, rows.stop) + chunk.held
    if normaliser is not None and _on_gpu(state, chunk):
        windows = [tokens for tokens in (most, state.settings.window) if tokens is not None]
        return prompt_kernels.column_sums(
            chunk.query[:, :, part],
            chunk.key,
            normaliser[:, :, part],
            place,
            weight[:, part],
            chunk.scaling,
            chunk.softcap,
            min(windows, default=None),
        )
    return torch.stack(
        [
            row_sums(
                chunk.query[b, :, part],
                chunk.key[b],
                _softmax(chunk),
                _sight(state, chunk, b, place, most=most),
                weight[b, part],
                None if normaliser is None else normaliser[b, :, part],
            )
            for b in range(len(chunk.query))
        ]
    )


def _sight(
    state: LayerState,
    chunk: Chunk,
    row: int,
    place: Tensor,
    least: int = 0,
    most: int | None = None,
) -> Sight:
    """What queries at `place` among the keys see of a batch row."""
    settings = state.settings
    window = settings.window
    if window is not None:
        most = window if most is None else min(most, window)
    if settings.block is None and chunk.valid is None and chunk.mask is None:
        return Sight(place, least, most)
    start = first_positions(state, chunk)[row]

    def hidden(rows: Tensor, key: Tensor) -> Tensor:
        query = place.to(key.device)[rows]
        inside = settings.sees(query[:, None] + chunk.first, key + chunk.first, start)
        seen = torch.ones_like(query[:, None] == key) if inside is None else inside
        if chunk.valid is not None:
            seen = seen & chunk.valid[row, key]
        if chunk.mask is not None:
            own = chunk.mask[min(row, len(chunk.mask) - 1), 0]
            mine = own.index_select(0, query - chunk.held)[:, (key - chunk.held).clamp(min=0)]
            seen = seen & (mine | (key < chunk.held))
        return ~seen

    return Sight(place, least, most, hidden)


@dataclass(slots=True)
class _Noted:
    """Queries of one batch row that may vote for far keys.

    Attributes:
        position: ``[m]`` int64 on the CPU, ascending.
        query: ``[Hq, m, D]``.
        normaliser: ``[Hq, m]``.
    """

    position: Tensor
    query: Tensor
    normaliser: Tensor

    def only(self, chosen: Tensor) -> _Noted:
        """Those of ``[m]`` bool alone."""
        index = chosen.nonzero()[:, 0].to(self.query.device)
        return _Noted(self.position[chosen], self.query[:, index], self.normaliser[:, index])


class LateScoreQueries:
    """Queries that vote for far keys once a prompt has ended, when its last rows are known.

    Beside the last `score_rows` of them these are one in `score_stride`: little beside the keys.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Softmax, list[_Noted]]] = []  # of each forward, by batch row
        self._settled = 0  # how many of the first ones have none of the newest `score_rows` left

    def note(self, state: LayerState, chunk: Chunk, normaliser: Tensor) -> None:
        """Keep the chunk's rows that vote for their stride, and the newest `score_rows`."""
        near, stride = _near_and_stride(state)
        position = torch.arange(chunk.length) + chunk.position
        own = [_Noted(position, chunk.query[b], normaliser[b]) for b in range(len(chunk.query))]
        self._noted.append((_softmax(chunk), own))
        starts = first_positions(state, chunk).tolist()
        end = chunk.position + chunk.length
        for _, rows in self._noted[self._settled :]:
            newest = False
            for b, start in enumerate(starts):
                number = rows[b].position - start
                last = rows[b].position >= end - near
                newest |= bool(last.any())
                rows[b] = rows[b].only(last | votes_for_its_stride(number, stride))
            self._settled += not newest

    def vote(self, state: LayerState, chunk: Chunk, scores: dict[int, Tensor]) -> None:
        """Raise `scores` ``[B, Hg, P + T]`` of the prompt's keys, all of which `chunk` has, and
        forget the queries."""
        near, stride = _near_and_stride(state)
        noted, self._noted, self._settled = self._noted, [], 0
        window, heads = state.settings.window, chunk.key.shape[1]
        if window is not None and window <= near:
            return
        starts = first_positions(state, chunk).tolist()
        first_last = max(chunk.first, chunk.first + chunk.key.shape[2] - near)
        sums = chunk.key.new_zeros(len(starts), heads, chunk.key.shape[2], dtype=torch.float32)
        for softmax, rows in noted:
            for b, (asked, start) in enumerate(zip(rows, starts, strict=True)):
                own = asked.only(asked.position < chunk.first + chunk.key.shape[2])
                index = own.position - start
                weight = far_weight(index, first_last - start, stride)
                weight = weight * state.settings.scorer.row_weight(index)
                weight = weight / (own.query.shape[0] // heads)
                place = own.position - chunk.first
                if chunk.valid is not None:
                    weight = weight * chunk.valid[b].cpu()[place]
                sums[b] += row_sums(
                    own.query,
                    chunk.key[b],
                    softmax,
                    _sight(state, chunk, b, place, least=near),
                    weight.to(sums.device),
                    own.normaliser,
                )
        _raise(state, scores, sums)

    def nbytes(self) -> int:
        return sum(
            own.query.nbytes + own.normaliser.nbytes for _, rows in self._noted for own in rows
        )
