"""`kv_append` in Triton: one program per segment of a group."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.score_select.triton import PUNCT_SCORE, SPECIAL_SCORE, ranks, vote_weight
from kvcompress.kernels.triton_encode import encode_rows, row_tile
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import (
    ExactView,
    GroupView,
    HeadsView,
    PiecesView,
    RowsView,
    RuleView,
    StepView,
    TokenView,
)

_PIECE_TILE = 64
_LAST = tl.constexpr(9223372036854775807)


class _Sizes(NamedTuple):
    exact: Annotated[int, "int32"]
    heads: Annotated[int, "int32"]
    spans: Annotated[int, "int32"]
    own_heads: Annotated[int, "int32"]
    scored_heads: Annotated[int, "int32"]
    queries: Annotated[int, "int32 constant"]
    k_wide: Annotated[int, "int32 constant"]
    v_wide: Annotated[int, "int32 constant"]
    k_tile: Annotated[int, "int32 constant"]
    v_tile: Annotated[int, "int32 constant"]
    recent_tile: Annotated[int, "int32 constant"]
    piece_tile: Annotated[int, "int32 constant"]


@triton.jit
def _append(token, exact, heads, group, pieces, rows, rule, step, initial, sizes):
    D: tl.constexpr = group.k.dim
    DV: tl.constexpr = group.v.dim
    lse, notes = step.combined.lse, step.advanced.notes
    i_s = tl.program_id(0).to(tl.int64)
    i_b, member = i_s // sizes.own_heads, i_s % sizes.own_heads
    head = pieces.first_head + member
    segment = i_b * sizes.heads + head
    now, start = tl.load(rows.seen) - 1, tl.load(rows.start + i_b)
    bits = tl.load(rule.bits + head)
    exact_slot = tl.load(notes + i_b * 3)
    left, flags = tl.load(notes + i_b * 3 + 1), tl.load(notes + i_b * 3 + 2).to(tl.int32)
    real = now >= 0
    if rows.valid is not None:
        real = tl.load(rows.valid + i_b) != 0
    kept_flags = flags & bits & 3

    own_score = tl.zeros((), tl.float32)
    if group.recent_score is not None:
        scored = (bits & 16) != 0
        o_r = tl.arange(0, sizes.recent_tile)
        recent_tokens = sizes.exact - exact.sinks
        m_r = o_r < tl.where(scored, recent_tokens, 0)
        p_recent = group.recent_score + (i_b * sizes.scored_heads + member) * recent_tokens
        recent = tl.load(p_recent + o_r, mask=m_r, other=0.0)
        arriving = tl.zeros((), tl.float32)
        if initial is not None:
            p_initial = initial + i_b * sizes.scored_heads + member
            arriving = tl.load(p_initial, mask=scored, other=0.0)
        if rule.vote != "none":
            weight = vote_weight(now, start, i_b, rows.valid, rule.vote) / sizes.queries
            votes = tl.zeros((sizes.recent_tile,), tl.float32)
            given = tl.zeros((), tl.float32)
            for g in tl.static_range(sizes.queries):
                at = segment * sizes.queries + g
                own_lse = tl.load(lse + at)
                own_lse = tl.where(own_lse == float("-inf"), float("inf"), own_lse)
                p_logits = step.combined.exact_logits + at * (sizes.exact + 1)
                logit = tl.load(p_logits + exact.sinks + o_r, mask=m_r, other=float("-inf"))
                votes += tl.exp(logit - own_lse)
                given += tl.exp(tl.load(p_logits + sizes.exact) - own_lse)
            recent += votes * weight
            arriving += given * weight
        place = exact_slot - exact.sinks
        own_score = tl.sum(tl.where(o_r == tl.maximum(place, 0), recent, 0.0), 0)
        replaced = o_r == tl.where(real, place, -1)
        tl.store(p_recent + o_r, tl.where(replaced, arriving, recent), mask=m_r)
        own_score = tl.where((kept_flags & 2) != 0, PUNCT_SCORE, own_score)
        own_score = tl.where((kept_flags & 1) != 0, SPECIAL_SCORE, own_score)
        own_score = tl.where(scored, own_score, 0.0)

    in_class = (kept_flags != 0) & ((bits & 16) == 0)
    own = ranks(rule, bits, now, start, i_b, head, sizes, left, own_score, in_class)
    p_chunks = heads.chunks + segment * 2
    first, count = tl.load(p_chunks) - pieces.first_work, tl.load(p_chunks + 1).to(tl.int32)
    o_c = tl.arange(0, sizes.piece_tile)
    least = float("inf")
    to = tl.zeros((), tl.int64) + _LAST
    for c in range(0, count, sizes.piece_tile):
        m_c = c + o_c < count
        rank = tl.load(step.weakest.rank + first + c + o_c, mask=m_c, other=float("inf"))
        slot = tl.load(step.weakest.slot + first + c + o_c, mask=m_c, other=_LAST)
        lower = tl.min(rank, 0)
        found = tl.min(tl.where(rank == lower, slot, _LAST), 0)
        # pieces come in the order of their slots: the first of equals stays
        to = tl.where((c == 0) | (lower < least), found, to)
        least = tl.minimum(least, lower)
    usable = tl.load(step.advanced.granted + segment) > 0
    keeps = (count > 0) & usable & (least <= own) & (own > float("-inf"))

    p_exact_k = exact.k + (segment * sizes.exact + exact_slot) * D
    p_exact_v = exact.v + (segment * sizes.exact + exact_slot) * DV
    one = tl.arange(0, 1)
    m_t = one < keeps.to(tl.int32)
    slots = one + to
    p_center, p_scale = heads.constants.center + head * D, heads.constants.scale + head * D
    encode_rows(p_exact_k + one, p_center + one, p_scale + one, m_t, group.k, slots, sizes.k_wide)
    encode_rows(p_exact_v + one, None, None, m_t, group.v, slots, sizes.v_wide)
    tl.store(group.position + to, left.to(tl.int32), mask=keeps)
    if group.score is not None:
        tl.store(group.score + to, own_score, mask=keeps & ((bits & 16) != 0))
    tl.debug_barrier()  # what leaves has been read by every thread
    model_head = tl.load(heads.number + head)
    o_d, o_v = tl.arange(0, sizes.k_tile), tl.arange(0, sizes.v_tile)
    p_k = token.key.data + i_b * token.key.row + model_head * token.key.head
    p_v = token.value.data + i_b * token.value.row + model_head * token.value.head
    k = tl.load(p_k + o_d, mask=o_d < D)
    v = tl.load(p_v + o_v, mask=o_v < DV)
    tl.store(p_exact_k + o_d, k, mask=o_d < tl.where(real, D, 0))
    tl.store(p_exact_v + o_v, v, mask=o_v < tl.where(real, DV, 0))


def kv_append(
    token: TokenView,
    exact: ExactView,
    heads: HeadsView,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    rule: RuleView,
    step: StepView,
    initial: Tensor | None,
) -> None:
    """As `kvcompress.kernels.kv_append.reference.kv_append`."""
    batch, kv_heads, held, dim = exact.k.shape
    own_heads, value_dim = pieces.base.shape[1], group.v.dim
    sizes = _Sizes(
        held,
        kv_heads,
        0 if rule.spans is None else rule.spans.shape[1],
        own_heads,
        0 if group.recent_score is None else group.recent_score.shape[1],
        step.combined.lse.shape[-1],
        row_tile(group.k.dtype, dim),
        row_tile(group.v.dtype, value_dim),
        triton.next_power_of_2(dim),
        triton.next_power_of_2(value_dim),
        triton.next_power_of_2(held - exact.sinks),
        _PIECE_TILE,
    )
    views = map(told, (token, exact, heads, group, pieces, rows, rule, step))
    _append[(batch * own_heads,)](*views, initial, told(sizes), num_warps=1)
