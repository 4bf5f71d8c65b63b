"""`kv_append` in Triton: one program per segment of a group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompress.kernels.score_select.triton import TIERS, VOTES, pinned_in, vote_weight
from kvcompress.kernels.triton_encode import encode_rows, row_tile
from kvcompress.kernels.triton_tiles import KINDS, priority, sees
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes

_PIECE_TILE = 64


@triton.jit
def _append(
    KEY, k_b, k_h, VALUE, v_b, v_h, EXACT_K, EXACT_V, HEADS, CENTER, SCALE, KD, KS, KM,
    VD, VS, VM, POS, SCORE, RECENT, INITIAL, LOGITS, LSE, NOTES, GRANTED, RANK, SLOT, CHUNKS,
    WINDOWS, BITS, START, SEEN, FIRST_VOTE, VALID, SPANS,
    exact, sinks, heads, own_heads, scored_heads, first_head, first_work, spans,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KW: tl.constexpr,
    VW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr,
    EP: tl.constexpr, BC: tl.constexpr, VOTE: tl.constexpr, MEAN: tl.constexpr,
    HAS_SCORE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SPANS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    SPECIAL_SCORE: tl.constexpr, PUNCT_SCORE: tl.constexpr, SPECIAL_TIER: tl.constexpr,
    LOCAL_TIER: tl.constexpr, PUNCT_TIER: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(0).to(tl.int64)
    i_b, member = i_s // own_heads, i_s % own_heads
    head = first_head + member
    now, start = tl.load(SEEN) - 1, tl.load(START + i_b)
    bits = tl.load(BITS + head)
    exact_slot = tl.load(NOTES + i_b * 3)
    left, flags = tl.load(NOTES + i_b * 3 + 1), tl.load(NOTES + i_b * 3 + 2).to(tl.int32)
    real = now >= 0
    if HAS_VALID:
        real = tl.load(VALID + i_b) != 0
    kept_flags = flags & bits & 3

    own_score = tl.zeros((), tl.float32)
    if HAS_SCORE:
        scored = (bits & 16) != 0
        o_r = tl.arange(0, EP)
        m_r = o_r < tl.where(scored, exact - sinks, 0)
        p_recent = RECENT + (i_b * scored_heads + member) * (exact - sinks)
        recent = tl.load(p_recent + o_r, mask=m_r, other=0.0)
        arriving = tl.zeros((), tl.float32)
        if HAS_INITIAL:
            arriving = tl.load(INITIAL + i_b * scored_heads + member, mask=scored, other=0.0)
        if VOTE > 0:
            weight = vote_weight(now, start, i_b, VALID, VOTE, HAS_VALID) / G
            votes = tl.zeros((EP,), tl.float32)
            given = tl.zeros((), tl.float32)
            for g in tl.static_range(G):
                at = (i_b * heads + head) * G + g
                lse = tl.load(LSE + at)
                lse = tl.where(lse == float("-inf"), float("inf"), lse)
                p_logits = LOGITS + at * (exact + 1)
                logit = tl.load(p_logits + sinks + o_r, mask=m_r, other=float("-inf"))
                votes += tl.exp(logit - lse)
                given += tl.exp(tl.load(p_logits + exact) - lse)
            recent += votes * weight
            arriving += given * weight
        place = exact_slot - sinks
        own_score = tl.sum(tl.where(o_r == tl.maximum(place, 0), recent, 0.0), 0)
        replaced = o_r == tl.where(real, place, -1)
        tl.store(p_recent + o_r, tl.where(replaced, arriving, recent), mask=m_r)
        own_score = tl.where((kept_flags & 2) != 0, PUNCT_SCORE, own_score)
        own_score = tl.where((kept_flags & 1) != 0, SPECIAL_SCORE, own_score)
        own_score = tl.where(scored, own_score, 0.0)

    place = tl.where(sees(now + 1, left, start, WINDOW, BLOCK), left, -1)
    own = priority(
        place,
        own_score,
        now + 1 - tl.maximum(place, tl.load(FIRST_VOTE)),
        now,
        tl.load(WINDOWS + i_b * heads + head),
        (bits & 4) != 0,
        (bits & 8) != 0,
        (kept_flags != 0) & ((bits & 16) == 0),
        pinned_in(SPANS, i_b, place - start, spans, HAS_SPANS),
        SPECIAL_SCORE,
        PUNCT_SCORE,
        SPECIAL_TIER,
        LOCAL_TIER,
        PUNCT_TIER,
        MEAN,
    )
    p_chunks = CHUNKS + (i_b * heads + head) * 2
    first, count = tl.load(p_chunks) - first_work, tl.load(p_chunks + 1).to(tl.int32)
    o_c = tl.arange(0, BC)
    least = float("inf")
    to = tl.zeros((), tl.int64) + 9223372036854775807
    for c in range(0, count, BC):
        m_c = c + o_c < count
        rank = tl.load(RANK + first + c + o_c, mask=m_c, other=float("inf"))
        slot = tl.load(SLOT + first + c + o_c, mask=m_c, other=9223372036854775807)
        lower = tl.min(rank, 0)
        found = tl.min(tl.where(rank == lower, slot, 9223372036854775807), 0)
        # pieces come in the order of their slots: the first of equals stays
        to = tl.where((c == 0) | (lower < least), found, to)
        least = tl.minimum(least, lower)
    usable = tl.load(GRANTED + i_b * heads + head) > 0
    keeps = (count > 0) & usable & (least <= own) & (own > float("-inf"))

    p_exact_k = EXACT_K + ((i_b * heads + head) * exact + exact_slot) * D
    p_exact_v = EXACT_V + ((i_b * heads + head) * exact + exact_slot) * DV
    one = tl.arange(0, 1)
    m_t = one < keeps.to(tl.int32)
    slots = one + to
    encode_rows(p_exact_k + one, CENTER + head * D + one, SCALE + head * D + one, m_t,
                KD, KS, KM, slots, K, 1, D, KW, True)  # fmt: skip
    encode_rows(p_exact_v + one, CENTER + one, SCALE + one, m_t,
                VD, VS, VM, slots, V, GROUPS, DV, VW, False)  # fmt: skip
    tl.store(POS + to, left.to(tl.int32), mask=keeps)
    if HAS_SCORE:
        tl.store(SCORE + to, own_score, mask=keeps & ((bits & 16) != 0))
    tl.debug_barrier()  # what leaves has been read by every thread
    model_head = tl.load(HEADS + head)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    k = tl.load(KEY + i_b * k_b + model_head * k_h + o_d, mask=o_d < D)
    v = tl.load(VALUE + i_b * v_b + model_head * v_h + o_v, mask=o_v < DV)
    tl.store(p_exact_k + o_d, k, mask=o_d < tl.where(real, D, 0))
    tl.store(p_exact_v + o_v, v, mask=o_v < tl.where(real, DV, 0))


def kv_append(
    key: Tensor,
    value: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    heads: Tensor,
    center: Tensor,
    key_scale: Tensor,
    keys: Codes,
    values: Codes,
    k_dtype: KVDtype,
    v_dtype: KVDtype,
    position: Tensor,
    score: Tensor | None,
    recent_score: Tensor | None,
    initial: Tensor | None,
    exact_logits: Tensor,
    lse: Tensor,
    notes: Tensor,
    granted: Tensor,
    rank: Tensor,
    slot: Tensor,
    chunks: Tensor,
    windows: Tensor,
    bits: Tensor,
    start: Tensor,
    seen: Tensor,
    first_vote: Tensor,
    valid: Tensor | None,
    spans: Tensor | None,
    first_head: int,
    own_heads: int,
    first_work: int,
    sink_tokens: int,
    vote: str,
    mean: bool,
    window: int,
    block: int,
) -> None:
    """As `kvcompress.kernels.kv_append.reference.kv_append`."""
    batch, kv_heads, exact, dim = exact_k.shape
    value_dim = exact_v.shape[-1]
    missing = position  # never touched
    scored = recent_score is not None

    def codes(c: Codes) -> tuple[Tensor, Tensor, Tensor]:
        data = c.data.view(torch.uint8) if c.data.element_size() == 1 else c.data
        return (
            data,
            missing if c.scale is None else c.scale,
            missing if c.minimum is None else c.minimum,
        )

    _append[(batch * own_heads,)](
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        exact_k,
        exact_v,
        heads,
        center,
        key_scale,
        *codes(keys),
        *codes(values),
        position,
        missing if score is None else score,
        missing if recent_score is None else recent_score,
        missing if initial is None else initial,
        exact_logits,
        lse,
        notes,
        granted,
        rank,
        slot,
        chunks,
        windows,
        bits,
        start,
        seen,
        first_vote,
        seen if valid is None else valid,
        seen if spans is None else spans,
        exact,
        sink_tokens,
        kv_heads,
        own_heads,
        0 if recent_score is None else recent_score.shape[1],
        first_head,
        first_work,
        0 if spans is None else spans.shape[1],
        D=dim,
        DV=value_dim,
        DP=triton.next_power_of_2(dim),
        DVP=triton.next_power_of_2(value_dim),
        KW=row_tile(k_dtype, dim),
        VW=row_tile(v_dtype, value_dim),
        K=KINDS[k_dtype],
        V=KINDS[v_dtype],
        GROUPS=1 if values.scale is None else values.scale.shape[-1],
        G=lse.shape[-1],
        EP=triton.next_power_of_2(exact - sink_tokens),
        BC=_PIECE_TILE,
        VOTE=VOTES[vote],
        MEAN=mean,
        HAS_SCORE=scored,
        HAS_INITIAL=initial is not None,
        HAS_VALID=valid is not None,
        HAS_SPANS=spans is not None,
        WINDOW=window,
        BLOCK=block,
        **TIERS,
        num_warps=1,
    )
