"""A decode step of the static cache by the Triton kernels.

The same rules as `static.attend` and `static.step`, in five kernels:
  decode_split    attention over each piece of a group's segments
  decode_combine  the pieces, the exact tokens, the token itself: the layer's output
  row_advance     what leaves the exact slots, and room in the heads
  score_select    votes on stored tokens, and the weakest of each piece
  kv_append       the leaving token over the weakest one, the token into its exact slot
No step reads anything back to the host, and every address and grid is fixed with the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.scorers import Scorer
from kvcompress.evict.scorers.attention import LiftScorer, MeanScorer
from kvcompress.kernels import ops, tuning
from kvcompress.kernels.available import triton_status
from kvcompress.kernels.row_advance.reference import rule_bits
from kvcompress.runtime.static.state import StaticGroup, StaticState
from kvcompress.runtime.store.state import LayerSettings

Kernels = Literal["auto", "torch", "triton"]


@dataclass(slots=True)
class StepTables:
    """What the kernels know of a layer's layout, made once.

    Attributes:
        work: per group ``[W, 4]``, see `tuning.work_list`; chunk: its longest piece.
        first_work: per group the number of its first piece in the layer.
        chunks: ``[B, H, 2]`` first piece of each segment and their number.
        bits: ``[H]``, see `rule_bits`.
        vote, mean: how the scorer adds up and ranks.
    """

    work: list[Tensor]
    chunk: list[int]
    first_work: list[int]
    chunks: Tensor
    bits: Tensor
    vote: str
    mean: bool

    @property
    def pieces(self) -> int:
        return self.first_work[-1] + self.work[-1].shape[0]


def choose_kernels(
    kernels: Kernels, settings: LayerSettings, head_dim: int, value_dim: int, device: torch.device
) -> bool:
    """Whether a layer decodes by the Triton kernels.

    Raises:
        KVCompressError: where ``triton`` was asked for and cannot be had, with the reason.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    reason = refusal(settings, head_dim, value_dim, device)
    if reason is not None and kernels == "triton":
        raise KVCompressError(f"layer {settings.layer}: no Triton kernels: {reason}")
    return reason is None


def refusal(
    settings: LayerSettings, head_dim: int, value_dim: int, device: torch.device
) -> str | None:
    """Why the Triton kernels do not decode a layer on `device`, None where they do."""
    status = triton_status(device)
    if status.reason is not None:
        return status.reason
    for head in settings.heads:
        reason = tuning.refuses(head.k_dtype, head.v_dtype, head_dim, value_dim)
        if reason is not None:
            return reason
    scorer = settings.scorer
    return None if _vote(scorer) else f"the scorer {scorer.name!r} ranks otherwise"


def _vote(scorer: Scorer) -> tuple[str, bool] | None:
    """How the kernels follow a scorer: weight of a vote, and whether ranks are per vote."""
    rank, row_weight = scorer.runs("rank"), scorer.runs("row_weight")
    if rank not in (Scorer.rank, MeanScorer.rank):
        return None
    mean = rank is MeanScorer.rank
    if not scorer.uses_attention:
        return "none", mean
    weights = {Scorer.row_weight: "one", LiftScorer.row_weight: "index"}
    weight = next((name for known, name in weights.items() if known is row_weight), None)
    return None if weight is None else (weight, mean)


def step_tables(state: StaticState, head_dim: int, value_dim: int) -> StepTables:
    """Tables for the layout of `state`; made when the layout is, never in a step."""
    device = state.start.device
    vote = _vote(state.settings.scorer)
    assert vote is not None
    work, chunk, first_work = [], [], []
    chunks = torch.zeros(state.batch, len(state.settings.heads), 2, dtype=torch.int64)
    scored = torch.zeros(len(state.settings.heads), dtype=torch.bool)
    total = 0
    for group in state.groups:
        config = tuning.split_config(group.k_dtype, group.v_dtype, max(head_dim, value_dim), device)
        slots = group.position.shape[0] - 1
        chunk.append(tuning.chunk_tokens(slots, config.chunk_tokens, device))
        pieces = tuning.work_list(_segments(group, state.batch), chunk[-1])
        for number, (_, _, row, head) in enumerate(pieces):
            if not chunks[row, head, 1]:
                chunks[row, head, 0] = total + number
            chunks[row, head, 1] += 1
        table = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 4)
        work.append(table.to(device))
        first_work.append(total)
        total += len(pieces)
        scored[group.scored] = group.score is not None
    rules = state.rules
    bits = rule_bits(rules.classes, rules.by_score, rules.keeps_rest, scored.to(device))
    tables = StepTables(work, chunk, first_work, chunks.to(device), bits, *vote)
    for tensor in (*tables.work, tables.chunks, tables.bits):
        torch._dynamo.mark_static_address(tensor)
    return tables


def _segments(group: StaticGroup, batch: int) -> list[tuple[int, int, int, int]]:
    return [
        (
            block.slots.start + (row * len(block.heads) + member) * block.capacity,
            block.capacity,
            row,
            block.first + member,
        )
        for block in group.blocks
        for row in range(batch)
        for member in range(len(block.heads))
    ]


def triton_step(
    state: StaticState,
    tables: StepTables,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    flags: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `kvcompress.runtime.static.step.decode_step`."""
    settings = state.settings
    query, key, value = (_rows(t) for t in (query, key, value))
    valid = None if valid is None else valid.contiguous()
    flags = None if flags is None else flags.contiguous()
    parts = _attend_codes(state, tables, query, value, scaling, softcap)
    out, lse, exact_logits = ops.decode_combine(
        query,
        key,
        value,
        state.exact_k,
        state.exact_v,
        state.exact_position,
        state.heads,
        parts.accumulated,
        parts.maximum,
        parts.total,
        tables.chunks,
        state.start,
        state.counter,
        valid,
        sinks,
        scaling,
        softcap or 0.0,
        settings.window or 0,
        settings.block or 0,
    )
    notes, granted = ops.row_advance(
        state.exact_position,
        state.exact_class,
        state.row_seen,
        state.start,
        state.class_counts,
        state.counter,
        valid,
        flags,
        state.budget,
        state.cap,
        state.capacity,
        tables.bits,
        state.spans,
        settings.sink_tokens,
    )
    for number in range(len(state.groups)):
        weakest = _weakest(state, tables, number, parts.logits[number], lse, granted, valid)
        softmax = (exact_logits, lse, notes, granted)
        _append(state, tables, number, key, value, softmax, weakest, valid)
    return out


@dataclass(slots=True)
class _Parts:
    """What `decode_split` leaves of a layer, and per group the logits of scored slots."""

    accumulated: Tensor
    maximum: Tensor
    total: Tensor
    logits: list[Tensor | None]


def _attend_codes(
    state: StaticState,
    tables: StepTables,
    query: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
) -> _Parts:
    rows, settings = query.shape[1] // value.shape[1], state.settings
    accumulated = state.center.new_empty(tables.pieces, rows, value.shape[-1])
    maximum = state.center.new_empty(tables.pieces, rows)
    total = torch.empty_like(maximum)
    logits = [
        group.score.new_empty(rows, group.score.shape[0] - 1)
        if tables.vote != "none" and group.score is not None
        else None
        for group in state.groups
    ]
    for number, group in enumerate(state.groups):
        ops.decode_split(
            query,
            state.heads,
            state.center,
            state.scale,
            *_parts(group),
            group.position,
            tables.work[number],
            state.start,
            state.counter,
            accumulated,
            maximum,
            total,
            logits[number],
            tables.first_work[number],
            scaling,
            softcap or 0.0,
            settings.window or 0,
            settings.block or 0,
            tables.chunk[number],
        )
    return _Parts(accumulated, maximum, total, logits)


def _weakest(
    state: StaticState,
    tables: StepTables,
    number: int,
    logits: Tensor | None,
    lse: Tensor,
    granted: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Votes of the token, then rank and slot of the weakest stored one in each piece of a group."""
    group, settings = state.groups[number], state.settings
    return ops.score_select(
        logits,
        lse,
        group.score,
        group.position,
        tables.work[number],
        group.base,
        granted,
        state.windows,
        tables.bits,
        state.start,
        state.counter,
        state.first_vote,
        valid,
        state.spans,
        group.span.start,
        tables.vote,
        tables.mean,
        settings.window or 0,
        settings.block or 0,
        tables.chunk[number],
    )


def _append(
    state: StaticState,
    tables: StepTables,
    number: int,
    key: Tensor,
    value: Tensor,
    softmax: tuple[Tensor, Tensor, Tensor, Tensor],
    weakest: tuple[Tensor, Tensor],
    valid: Tensor | None,
) -> None:
    group, settings = state.groups[number], state.settings
    ops.kv_append(
        key,
        value,
        state.exact_k,
        state.exact_v,
        state.heads,
        state.center,
        state.scale,
        *_parts(group),
        group.position,
        group.score,
        group.recent_score,
        _initial(state, group, key),
        *softmax,
        *weakest,
        tables.chunks,
        state.windows,
        tables.bits,
        state.start,
        state.counter,
        state.first_vote,
        valid,
        state.spans,
        group.span.start,
        group.base.shape[1],
        tables.first_work[number],
        settings.sink_tokens,
        tables.vote,
        tables.mean,
        settings.window or 0,
        settings.block or 0,
    )


def _rows(t: Tensor) -> Tensor:
    """With adjacent channels, as the kernels read them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _parts(
    group: StaticGroup,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None, str, str]:
    k, v = group.keys, group.values
    codes = (k.data, k.scale, k.minimum, v.data, v.scale, v.minimum)
    return (*codes, group.k_dtype, group.v_dtype)


def _initial(state: StaticState, group: StaticGroup, key: Tensor) -> Tensor | None:
    """``[B, Hs]`` score of the token before anyone has voted, None for zero."""
    scorer = state.settings.scorer
    if group.recent_score is None or scorer.runs("initial") is Scorer.initial:
        return None
    heads = state.heads[group.scored]
    own = key[:, :, 0].index_select(1, heads)
    shape = own.shape[:-1]
    return scorer.initial(own, (state.counter - 1).expand(shape), heads.expand(shape))
