"""A decode step of the static cache by the Triton kernels.

The same rules as `static.attend` and `static.step`, in five kernels:
  decode_pieces   attention over each piece of a group's segments
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
from kvcompress.kernels.view import (
    CodesView,
    ExactView,
    GroupView,
    HeadsView,
    KeyConstants,
    PartsView,
    PiecesView,
    Reach,
    RoomView,
    RowsView,
    RuleView,
    Softmax,
    StepView,
    TokenView,
)
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
    valid = None if valid is None else valid.contiguous()
    flags = None if flags is None else flags.contiguous()
    token = TokenView(_rows(query), _rows(key), _rows(value), flags)
    reach = Reach(settings.window or 0, settings.block or 0)
    exact = ExactView(
        *(state.exact_k, state.exact_v, state.exact_position, state.exact_class),
        settings.sink_tokens,
    )
    heads = HeadsView(state.heads, KeyConstants(state.center, state.scale), tables.chunks)
    rows = RowsView(state.counter, state.start, state.row_seen, state.class_counts, valid)
    rule = RuleView(
        *(tables.bits, state.windows, state.first_vote, state.spans, tables.vote, tables.mean),
        reach,
    )
    softmax = Softmax(scaling, softcap, sinks)
    groups = [
        (_group(group, query.shape[-1], value.shape[-1]), _pieces(group, tables, number))
        for number, group in enumerate(state.groups)
    ]
    parts = _empty_parts(tables, query, value)
    logits = []
    for group, pieces in groups:
        logits.append(_empty_logits(group, tables, parts))
        ops.decode_pieces(token, heads, group, pieces, rows, softmax, reach, parts, logits[-1])
    combined = ops.decode_combine(token, exact, heads, parts, rows, softmax, reach)
    room = RoomView(state.budget, state.cap, state.capacity)
    advanced = ops.row_advance(flags, exact, rows, room, rule)
    for number, (group, pieces) in enumerate(groups):
        weakest = ops.score_select(
            logits[number], combined.lse, advanced.granted, group, pieces, rows, rule
        )
        step = StepView(combined, advanced, weakest)
        initial = _initial(state, state.groups[number], key)
        ops.kv_append(token, exact, heads, group, pieces, rows, rule, step, initial)
    return combined.out


def _group(group: StaticGroup, head_dim: int, value_dim: int) -> GroupView:
    return GroupView(
        CodesView.of(group.keys, group.k_dtype, head_dim),
        CodesView.of(group.values, group.v_dtype, value_dim),
        group.position,
        group.score,
        group.recent_score,
    )


def _pieces(group: StaticGroup, tables: StepTables, number: int) -> PiecesView:
    work, first_work = tables.work[number], tables.first_work[number]
    return PiecesView(work, group.base, group.span.start, first_work, tables.chunk[number])


def _empty_parts(tables: StepTables, query: Tensor, value: Tensor) -> PartsView:
    shape = (tables.pieces, query.shape[1] // value.shape[1])
    maximum = query.new_empty(shape, dtype=torch.float32)
    accumulated = query.new_empty(*shape, value.shape[-1], dtype=torch.float32)
    return PartsView(accumulated, maximum, torch.empty_like(maximum))


def _empty_logits(group: GroupView, tables: StepTables, parts: PartsView) -> Tensor | None:
    """``[G, Ns]`` for the logits of a group's scored slots, where they vote."""
    if tables.vote == "none" or group.score is None:
        return None
    return group.score.new_empty(parts.maximum.shape[1], group.score.shape[0] - 1)


def _rows(t: Tensor) -> Tensor:
    """With adjacent channels, as the kernels read them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _initial(state: StaticState, group: StaticGroup, key: Tensor) -> Tensor | None:
    """``[B, Hs]`` score of the token before anyone has voted, None for zero."""
    scorer = state.settings.scorer
    if group.recent_score is None or scorer.runs("initial") is Scorer.initial:
        return None
    heads = state.heads[group.scored]
    own = key[:, :, 0].index_select(1, heads)
    shape = own.shape[:-1]
    return scorer.initial(own, (state.counter - 1).expand(shape), heads.expand(shape))
