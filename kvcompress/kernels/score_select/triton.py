"""`score_select` in Triton: one program per piece of the work list."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.evict import keepset
from kvcompress.kernels.triton_tiles import sees
from kvcompress.kernels.triton_view import told
from kvcompress.kernels.view import GroupView, PiecesView, RowsView, RuleView, Weakest

SPECIAL_SCORE = tl.constexpr(keepset.SPECIAL_SCORE)
PUNCT_SCORE = tl.constexpr(keepset.PUNCT_SCORE)
_SPECIAL_TIER = tl.constexpr(keepset.SPECIAL_TIER)
_LOCAL_TIER = tl.constexpr(keepset.LOCAL_TIER)
_PUNCT_TIER = tl.constexpr(keepset.PUNCT_TIER)


class _Sizes(NamedTuple):
    heads: Annotated[int, "int32"]
    spans: Annotated[int, "int32"]
    own_heads: Annotated[int, "int32"]
    scored_slots: Annotated[int, "int32"]
    queries: Annotated[int, "int32 constant"]
    tile: Annotated[int, "int32 constant"]


@triton.jit
def vote_weight(now, start, row, valid, vote: tl.constexpr):
    """Weight of a row's query among the votes."""
    weight = 1.0
    if vote == "index":
        weight = (now - start).to(tl.float32) + 1.0
    if valid is not None:
        weight = tl.where(tl.load(valid + row) != 0, weight, 0.0)
    return weight


@triton.jit
def _pinned_in(spans, row, number, count):
    """Whether the `number`-th real token of a row lies in one of its protected spans."""
    found = number < -2147483647
    if spans is not None:
        for s in range(0, count):
            low = tl.load(spans + (row * count + s) * 2)
            high = tl.load(spans + (row * count + s) * 2 + 1)
            found = found | ((number >= low) & (number < high))
    return found


@triton.jit
def ranks(rule, bits, now, start, row, head, sizes, position, score, in_class):
    """float32 priority of tokens of a row and head, see `kvcompress.evict.keepset.priority`.

    Args:
        sizes: `heads` of the layer and `spans` of a row.
        score: 0 in heads without any; in_class: false in those with scores.
    """
    held = tl.where(sees(now + 1, position, start, rule.reach), position, -1)
    votes = now + 1 - tl.maximum(held.to(tl.int64), tl.load(rule.first_vote))
    age = held.to(tl.float32)
    recency = 1.0 + age * 1.1920928955078125e-07
    plain = tl.where(score >= PUNCT_SCORE / 2, 0.0, score)
    if rule.mean:
        plain = tl.div_rn(plain, tl.maximum(votes, 1).to(tl.float32))
    value = tl.where((bits & 4) != 0, plain, age)
    window = tl.load(rule.windows + row * sizes.heads + head)
    value = tl.where(held > now - window, recency * _LOCAL_TIER, value)
    value = tl.where((bits & 8) != 0, value, float("-inf"))
    punct = (score >= PUNCT_SCORE / 2) & (score < SPECIAL_SCORE / 2)
    value = tl.where(punct, tl.maximum(value, recency * _PUNCT_TIER), value)
    value = tl.where((score >= SPECIAL_SCORE / 2) | in_class, recency * _SPECIAL_TIER, value)
    pinned = _pinned_in(rule.spans, row, held - start, sizes.spans)
    value = tl.where(pinned, float("inf"), value)
    return tl.where(held < 0, float("-inf"), value)


@triton.jit
def _select(logits, lse, granted, group, pieces, rows, rule, found, sizes):
    i_w = tl.program_id(0).to(tl.int64)
    first, count = tl.load(pieces.work + i_w * 4), tl.load(pieces.work + i_w * 4 + 1).to(tl.int32)
    row, head = tl.load(pieces.work + i_w * 4 + 2), tl.load(pieces.work + i_w * 4 + 3)
    now, start = tl.load(rows.seen) - 1, tl.load(rows.start + row)
    bits = tl.load(rule.bits + head)
    o = tl.arange(0, sizes.tile)
    m = o < count
    slot = first + o
    held = tl.load(group.position + slot, mask=m, other=-1)
    score = tl.zeros((sizes.tile,), tl.float32)
    if group.score is not None:
        m_s = o < tl.where((bits & 16) != 0, count, 0)
        score = tl.load(group.score + slot, mask=m_s, other=0.0)
        if logits is not None and rule.vote != "none":
            seen = m_s & sees(now, held, start, rule.reach)
            votes = tl.zeros((sizes.tile,), tl.float32)
            for g in tl.static_range(sizes.queries):
                own_lse = tl.load(lse + (row * sizes.heads + head) * sizes.queries + g)
                p_logits = logits + g * sizes.scored_slots + slot
                logit = tl.load(p_logits, mask=seen, other=float("-inf"))
                votes += tl.where(seen, tl.exp(logit - own_lse), 0.0)
            weight = vote_weight(now, start, row, rows.valid, rule.vote)
            score += votes * (weight / sizes.queries)
            tl.store(group.score + slot, score, mask=seen)
    only = ((bits & 3) != 0) & ((bits & 8) == 0) & ((bits & 16) == 0)
    rank = ranks(rule, bits, now, start, row, head, sizes, held, score, only)
    usable = tl.load(granted + row * sizes.heads + head)
    inside = slot - tl.load(pieces.base + row * sizes.own_heads + head - pieces.first_head)
    rank = tl.where(m & (inside < usable), rank, float("inf"))
    least = tl.min(rank, 0)
    place = tl.min(tl.where(rank == least, o, sizes.tile), 0)
    tl.store(found.rank + i_w, least)
    tl.store(found.slot + i_w, first + place)


def score_select(
    logits: Tensor | None,
    lse: Tensor,
    granted: Tensor,
    group: GroupView,
    pieces: PiecesView,
    rows: RowsView,
    rule: RuleView,
) -> Weakest:
    """As `kvcompress.kernels.score_select.reference.score_select`."""
    heads, queries = lse.shape[1:]
    count = len(pieces.work)
    found = Weakest(lse.new_empty(count), rows.seen.new_empty(count))
    sizes = _Sizes(
        heads,
        0 if rule.spans is None else rule.spans.shape[1],
        pieces.base.shape[1],
        0 if logits is None else logits.shape[1],
        queries,
        triton.next_power_of_2(pieces.longest),
    )
    if count:
        views = map(told, (group, pieces, rows, rule, found, sizes))
        _select[(count,)](logits, lse, granted, *views, num_warps=4)
    return found
