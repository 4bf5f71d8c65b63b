"""`score_select` in Triton: one program per piece of the work list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvcompress.evict.keepset import (
    LOCAL_TIER,
    PUNCT_SCORE,
    PUNCT_TIER,
    SPECIAL_SCORE,
    SPECIAL_TIER,
)
from kvcompress.kernels.triton_tiles import priority, sees

VOTES = {"none": 0, "one": 1, "index": 2}
# of `priority`, in its order
TIERS = {
    "SPECIAL_SCORE": SPECIAL_SCORE,
    "PUNCT_SCORE": PUNCT_SCORE,
    "SPECIAL_TIER": SPECIAL_TIER,
    "LOCAL_TIER": LOCAL_TIER,
    "PUNCT_TIER": PUNCT_TIER,
}


@triton.jit
def vote_weight(now, start, row, VALID, VOTE: tl.constexpr, HAS_VALID: tl.constexpr):
    """Weight of a row's query among the votes."""
    weight = 1.0
    if VOTE == 2:
        weight = (now - start).to(tl.float32) + 1.0
    if HAS_VALID:
        weight = tl.where(tl.load(VALID + row) != 0, weight, 0.0)
    return weight


@triton.jit
def pinned_in(SPANS, row, number, spans, HAS_SPANS: tl.constexpr):
    """Whether the `number`-th real token of a row lies in one of its protected spans."""
    found = number < -2147483647
    if HAS_SPANS:
        for s in range(0, spans):
            low = tl.load(SPANS + (row * spans + s) * 2)
            high = tl.load(SPANS + (row * spans + s) * 2 + 1)
            found = found | ((number >= low) & (number < high))
    return found


@triton.jit
def _select(
    LOGITS, LSE, SCORE, POS, WORK, GRANTED, WINDOWS, BITS, START, SEEN, FIRST_VOTE, VALID, SPANS,
    BASE, RANK, SLOT, scored_slots, heads, spans, first_head, own_heads,
    G: tl.constexpr, CHUNK: tl.constexpr, VOTE: tl.constexpr, MEAN: tl.constexpr,
    HAS_SCORE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SPANS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    SPECIAL_SCORE: tl.constexpr, PUNCT_SCORE: tl.constexpr, SPECIAL_TIER: tl.constexpr,
    LOCAL_TIER: tl.constexpr, PUNCT_TIER: tl.constexpr,
):  # fmt: skip
    i_w = tl.program_id(0).to(tl.int64)
    first, count = tl.load(WORK + i_w * 4), tl.load(WORK + i_w * 4 + 1).to(tl.int32)
    row, head = tl.load(WORK + i_w * 4 + 2), tl.load(WORK + i_w * 4 + 3)
    now, start = tl.load(SEEN) - 1, tl.load(START + row)
    bits = tl.load(BITS + head)
    o = tl.arange(0, CHUNK)
    m = o < count
    slot = first + o
    held = tl.load(POS + slot, mask=m, other=-1)
    score = tl.zeros((CHUNK,), tl.float32)
    if HAS_SCORE:
        m_s = o < tl.where((bits & 16) != 0, count, 0)
        score = tl.load(SCORE + slot, mask=m_s, other=0.0)
        if VOTE > 0:
            seen = m_s & sees(now, held, start, WINDOW, BLOCK)
            votes = tl.zeros((CHUNK,), tl.float32)
            for g in tl.static_range(G):
                lse = tl.load(LSE + (row * heads + head) * G + g)
                logit = tl.load(LOGITS + g * scored_slots + slot, mask=seen, other=float("-inf"))
                votes += tl.where(seen, tl.exp(logit - lse), 0.0)
            weight = vote_weight(now, start, row, VALID, VOTE, HAS_VALID)
            score += votes * (weight / G)
            tl.store(SCORE + slot, score, mask=seen)
    held = tl.where(sees(now + 1, held, start, WINDOW, BLOCK), held, -1)
    only = ((bits & 3) != 0) & ((bits & 8) == 0) & ((bits & 16) == 0)
    rank = priority(
        held,
        score,
        now + 1 - tl.maximum(held.to(tl.int64), tl.load(FIRST_VOTE)),
        now,
        tl.load(WINDOWS + row * heads + head),
        (bits & 4) != 0,
        (bits & 8) != 0,
        only,
        pinned_in(SPANS, row, held - start, spans, HAS_SPANS),
        SPECIAL_SCORE,
        PUNCT_SCORE,
        SPECIAL_TIER,
        LOCAL_TIER,
        PUNCT_TIER,
        MEAN,
    )
    usable = tl.load(GRANTED + row * heads + head)
    inside = slot - tl.load(BASE + row * own_heads + head - first_head)
    rank = tl.where(m & (inside < usable), rank, float("inf"))
    least = tl.min(rank, 0)
    place = tl.min(tl.where(rank == least, o, CHUNK), 0)
    tl.store(RANK + i_w, least)
    tl.store(SLOT + i_w, first + place)


def score_select(
    logits: Tensor | None,
    lse: Tensor,
    score: Tensor | None,
    position: Tensor,
    work: Tensor,
    base: Tensor,
    granted: Tensor,
    windows: Tensor,
    bits: Tensor,
    start: Tensor,
    seen: Tensor,
    first_vote: Tensor,
    valid: Tensor | None,
    spans: Tensor | None,
    first_head: int,
    vote: str,
    mean: bool,
    window: int,
    block: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """As `kvcompress.kernels.score_select.reference.score_select`."""
    heads, group = lse.shape[1:]
    rank = lse.new_empty(len(work))
    slot = seen.new_empty(len(work))
    if not len(work):
        return rank, slot
    _select[(len(work),)](
        lse if logits is None else logits,
        lse,
        lse if score is None else score,
        position,
        work,
        granted,
        windows,
        bits,
        start,
        seen,
        first_vote,
        seen if valid is None else valid,
        seen if spans is None else spans,
        base,
        rank,
        slot,
        0 if logits is None else logits.shape[1],
        heads,
        0 if spans is None else spans.shape[1],
        first_head,
        base.shape[1],
        G=group,
        CHUNK=triton.next_power_of_2(chunk),
        VOTE=0 if logits is None else VOTES[vote],
        MEAN=mean,
        HAS_SCORE=score is not None,
        HAS_VALID=valid is not None,
        HAS_SPANS=spans is not None,
        WINDOW=window,
        BLOCK=block,
        **TIERS,
        num_warps=4,
    )
    return rank, slot
