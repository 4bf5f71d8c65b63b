"""The token that leaves the exact slots takes a victim's slot of codes, or is dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.evict.keepset import class_score
from kvcompress.kernels.decode_split.flat import sees
from kvcompress.kernels.score_select.reference import ranks, vote_weight
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes, encode, rounded, value_groups


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
    """Take the token in, in the `own_heads` heads of one group.

    Recent scores get the token's votes; the token that leaves is ranked against the weakest stored
    one and encoded over it where it is not weaker; the token's vectors take the exact slot.

    Args:
        key, value: ``[B, Hkv, 1, ·]`` of the token, in the model's order of heads.
        exact_k, exact_v: ``[B, H, E, ·]``, changed in place, as are keys, values, position, score
            (flat, as for `score_select`) and recent_score ``[B, Hs, E − sinks]``.
        initial: ``[B, Hs]`` score of the token before anyone has voted, None is 0.
        exact_logits, lse: from `decode_combine`.
        notes, granted: from `row_advance`, which has entered the token's position already.
        rank, slot: from `score_select` of this group; chunks: ``[B, H, 2]``, see `decode_combine`,
            whose pieces are counted from the layer's first, `first_work` being this group's.
    """
    now, group = seen - 1, lse.shape[-1]
    weight = vote_weight(now, start, valid, vote, group)
    for row in range(len(notes)):
        exact_slot, left, flags = notes[row].tolist()
        real = valid is None or bool(valid[row])
        recent = exact_slot - sink_tokens
        for member in range(own_heads):
            head = first_head + member
            at = (row, member)
            own_score = torch.zeros(1)
            if recent_score is not None and int(bits[head]) & 16:
                share = torch.exp(exact_logits[row, head] - lse[row, head, :, None]) * weight[row]
                share = share.nan_to_num(0.0).sum(0)
                recent_score[at] += share[sink_tokens:-1]
                own_score = recent_score[at][max(0, recent)][None]
                own_score = class_score(bits[head] & 3, torch.tensor([flags]), own_score)
                arriving = share[-1] + (0.0 if initial is None else initial[at])
                if real and recent >= 0:
                    recent_score[at][recent] = arriving
            first, count = chunks[row, head].tolist()
            pieces = slice(first - first_work, first - first_work + count)
            begin, place = start[row].long(), torch.tensor([left])
            place = place.masked_fill(~sees(now + 1, place, begin, window, block), -1)
            own = ranks(
                bits[head],
                place,
                own_score,
                torch.tensor([bool(flags & int(bits[head]) & 3)]),
                windows[row, head],
                now,
                begin,
                first_vote,
                None if spans is None else spans[row],
                mean,
            )[0]
            if count and int(granted[row, head]) and own > -torch.inf:
                best = rank[pieces].argmin()
                if rank[pieces][best] <= own:
                    to = int(slot[pieces][best])
                    position[to] = left
                    if score is not None and int(bits[head]) & 16:
                        score[to] = own_score[0]
                    k = exact_k[row, head, exact_slot].float()
                    k = (k - center[head]) / key_scale[head]
                    k = rounded(k, exact_k.dtype) if k_dtype == "model" else k
                    v = exact_v[row, head, exact_slot]
                    _write(keys, to, encode(k, k_dtype))
                    _write(values, to, encode(v, v_dtype, value_groups(v_dtype, v.shape[-1])))
            if real:
                exact_k[row, head, exact_slot] = key[row, int(heads[head]), 0]
                exact_v[row, head, exact_slot] = value[row, int(heads[head]), 0]


def _write(target: Codes, slot: int, source: Codes) -> None:
    for ours, theirs in (
        (target.data, source.data),
        (target.scale, source.scale),
        (target.minimum, source.minimum),
    ):
        if ours is not None and theirs is not None:
            ours[slot] = theirs
