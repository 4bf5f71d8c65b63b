"""One decoded token per row through a layer of the static cache: attend, evict, store.

The rules are those of `step.store_token`; here they are tensor operations alone, in place and of
fixed shape, so that a compiler takes them into one graph and CUDA graphs can replay them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.evict.keepset import class_score, priority
from kvcompress.quant.codec import Codes, encode, rounded, value_groups
from kvcompress.runtime.static.attend import Token, attend_token
from kvcompress.runtime.static.state import Block, StaticGroup, StaticState
from kvcompress.runtime.store.segments import EMPTY


@dataclass(slots=True)
class OutgoingToken:
    """What lies in the exact slot that each row's token takes, and leaves it.

    Attributes:
        key, value: ``[B, Hkv, 1, D]``.
        position: ``[B, 1, 1]`` int64, −1 if nothing leaves.
        flags: ``[B, 1, 1]`` class flags; `in_class` ``[B, Hkv, 1]`` bool, of the head's classes.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    flags: Tensor
    in_class: Tensor


def decode_step(
    state: StaticState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    flags: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one token per row, then eviction and storage.

    Args:
        query: ``[B, Hq, 1, D]``; key, value: ``[B, Hkv, 1, D]``.
        valid: ``[B]`` bool, None if no row gets padding.
        flags: ``[B]`` uint8 class flags, or None.
        sinks: ``[Hq]`` learned logits that join every softmax, or None.

    Returns:
        ``[B, 1, Hq, Dv]`` contiguous, in the query's dtype.
    """
    batch, heads = key.shape[:2]
    rows = (query.float() * scaling).reshape(batch, heads, -1, query.shape[-1])
    extra = None if sinks is None else sinks.float().view(heads, -1)
    if not state.ordered:
        rows, key, value = (t.index_select(1, state.heads) for t in (rows, key, value))
        extra = None if extra is None else extra.index_select(0, state.heads)
    now = state.counter - 1
    begins = state.start < 0 if valid is None else (state.start < 0) & valid
    start = torch.where(begins, now, state.start.long())
    token = Token(rows, key, value, now, start, valid, flags, softcap, extra)
    out, own_scores = attend_token(state, token)
    slot = _exact_slot(state)
    outgoing = _outgoing(state, token, slot)
    granted = _granted(state, token).unsqueeze(-1)
    for group, own_score in zip(state.groups, own_scores, strict=True):
        recent = slot - state.settings.sink_tokens
        score = None if group.recent_score is None else _recent(group.recent_score, recent)
        _store_token(state, group, outgoing, score, granted, token)
        if group.recent_score is not None and own_score is not None and score is not None:
            stays = recent < 0 if valid is None else (recent < 0) | ~valid[:, None, None]
            place = recent.clamp(min=0).expand(score.shape)
            group.recent_score.scatter_(2, place, torch.where(stays, score, own_score))
    _store(state, token, outgoing, slot)
    if not state.ordered:
        out = out.index_select(1, state.restore)
    return out.to(query.dtype).flatten(1, 2).unsqueeze(1)


# ---- the exact slots
def _exact_slot(state: StaticState) -> Tensor:
    """``[B, 1, 1]`` where the token goes: the next free sink, or the oldest recent token's slot."""
    sinks = state.settings.sink_tokens
    oldest = state.exact_position[:, sinks:].argmin(1) + sinks
    if sinks:
        oldest = torch.where(state.row_seen < sinks, state.row_seen.long(), oldest)
    return oldest[:, None, None]


def _recent(recent_score: Tensor, recent: Tensor) -> Tensor:
    """``[B, Hs, 1]`` scores in the slots ``[B, 1, 1]``."""
    return recent_score.gather(2, recent.clamp(min=0).expand(*recent_score.shape[:2], 1))


def _outgoing(state: StaticState, token: Token, slot: Tensor) -> OutgoingToken:
    """Read the slot that the token takes, and count the class of what leaves it."""
    position = state.exact_position.gather(1, slot[:, 0]).long()
    if token.valid is not None:
        position = position.masked_fill(~token.valid[:, None], EMPTY)
    flags = torch.zeros_like(position)
    if state.exact_class is not None and state.class_counts is not None:
        flags = state.exact_class.gather(1, slot[:, 0]).long()
        state.class_counts.scatter_add_(1, flags, (position >= 0).to(torch.int32))
    place = slot.unsqueeze(-1)
    return OutgoingToken(
        state.exact_k.gather(2, place.expand(token.key.shape)),
        state.exact_v.gather(2, place.expand(token.value.shape)),
        position.unsqueeze(1),
        flags.unsqueeze(1),
        (flags & state.rules.classes).unsqueeze(-1) != 0,
    )


def _store(state: StaticState, token: Token, outgoing: OutgoingToken, slot: Tensor) -> None:
    """The token takes its exact slot."""
    key, value, now = token.key, token.value, token.now.to(torch.int32).expand(state.batch, 1)
    flags = torch.zeros_like(outgoing.flags[:, 0]) if token.flags is None else token.flags[:, None]
    if token.valid is None:
        state.row_seen.add_(1)
    else:
        valid = token.valid[:, None]
        key = torch.where(valid[..., None, None], key, outgoing.key)
        value = torch.where(valid[..., None, None], value, outgoing.value)
        now = torch.where(valid, now, state.exact_position.gather(1, slot[:, 0]))
        flags = torch.where(valid, flags, outgoing.flags[:, 0])
        state.row_seen.add_(token.valid)
    place = slot.unsqueeze(-1)
    state.exact_k.scatter_(2, place.expand(key.shape), key)
    state.exact_v.scatter_(2, place.expand(value.shape), value)
    state.exact_position.scatter_(1, slot[:, 0], now)
    if state.exact_class is not None:
        state.exact_class.scatter_(1, slot[:, 0], flags.to(torch.uint8))
    state.start.copy_(token.start)


# ---- eviction
def _granted(state: StaticState, token: Token) -> Tensor:
    """``[B, Hkv]`` slots that each (row, head) may use once the token has come."""
    granted = state.budget
    if state.class_counts is not None:
        granted = granted + (state.class_counts.unsqueeze(-1) * state.class_table).sum(1)
    granted = torch.minimum(granted, state.cap)
    if state.spans is not None:
        seen = state.row_seen + (1 if token.valid is None else token.valid)
        left = (seen - state.settings.recent_tokens)[:, None]
        low = state.spans[..., 0].clamp(min=state.settings.sink_tokens)
        held = (torch.minimum(state.spans[..., 1], left) - low).clamp(min=0)
        granted = granted + held.sum(1, keepdim=True)
    return torch.minimum(granted, state.capacity)


def _store_token(
    state: StaticState,
    group: StaticGroup,
    outgoing: OutgoingToken,
    score: Tensor | None,
    granted: Tensor,
    token: Token,
) -> None:
    """In each head the leaving token takes the slot of the lowest ranked one, or is dropped.

    Args:
        score: ``[B, Hs, 1]`` of the leaving token.
        granted: ``[B, Hkv, 1]``, see `_granted`.
    """
    span = group.span
    if score is not None:
        classes = state.rules.classes[group.scored].unsqueeze(-1)
        score = class_score(classes, outgoing.flags, score)
    victims, kept = [], []
    for block in group.blocks:
        victim, keeps = _victim(state, group, block, outgoing, score, granted, token)
        victims.append(victim)
        kept.append(keeps)
    victim, keeps = torch.cat(victims, 1)[..., 0], torch.cat(kept, 1)[..., 0]
    slots = victim + group.base
    spare = group.position.shape[0] - 1
    index = torch.where(keeps, slots, spare).flatten()
    keys, values = _encoded(state, group, outgoing)
    for target, source in ((group.keys, keys), (group.values, values)):
        _write(target.data, index, source.data)
        _write(target.scale, index, source.scale)
        _write(target.minimum, index, source.minimum)
    position = outgoing.position.expand(-1, span.stop - span.start, -1).to(torch.int32)
    group.position.index_copy_(0, index, position.flatten())
    if group.score is not None and score is not None:
        scored = score.shape[1]
        spare = group.score.shape[0] - 1
        index = torch.where(keeps[:, :scored], slots[:, :scored], spare).flatten()
        group.score.index_copy_(0, index, score.flatten())


def _write(target: Tensor | None, index: Tensor, source: Tensor | None) -> None:
    """Rows ``[B, Hg, 1, …]`` to the flat slots `index`, in place."""
    if target is None or source is None:
        return
    if target.dtype == torch.float8_e4m3fn:
        target, source = target.view(torch.uint8), source.view(torch.uint8)
    target.index_copy_(0, index, source.flatten(0, 2))


def _encoded(
    state: StaticState, group: StaticGroup, outgoing: OutgoingToken
) -> tuple[Codes, Codes]:
    """Codes ``[B, Hg, 1, …]`` of the leaving keys and values."""
    span, k_dtype, v_dtype = group.span, group.k_dtype, group.v_dtype
    key, value = outgoing.key[:, span].float(), outgoing.value[:, span]
    key = (key - state.center[span].unsqueeze(1)) / state.scale[span].unsqueeze(1)
    parts = value_groups(v_dtype, value.shape[-1])
    if k_dtype == v_dtype != "model" and parts == 1 and key.shape == value.shape:
        both = encode(torch.stack([key, value.float()]), k_dtype)
        low = both.minimum
        return (
            Codes(both.data[0], _of(both.scale, 0), _of(low, 0)),
            Codes(both.data[1], _of(both.scale, 1), _of(low, 1)),
        )
    keys = Codes(rounded(key, outgoing.key.dtype), None, None)
    return keys if k_dtype == "model" else encode(key, k_dtype), encode(value, v_dtype, parts)


def _of(t: Tensor | None, index: int) -> Tensor | None:
    return None if t is None else t[index]


def _victim(
    state: StaticState,
    group: StaticGroup,
    block: Block,
    outgoing: OutgoingToken,
    score: Tensor | None,
    granted: Tensor,
    token: Token,
) -> tuple[Tensor, Tensor]:
    """``[B, Hb, 1]`` slot that each segment gives up, and whether it does.

    The leaving token is ranked as one slot more, the last: where it is the lowest, it is dropped.
    """
    usable = granted[:, block.span]
    if not block.capacity:
        return usable.long(), usable > 0
    rank = _rank(state, group, block, outgoing, score, token)
    slots = torch.arange(block.capacity + 1, device=rank.device)
    rank = rank.masked_fill((slots >= usable) & (slots < block.capacity), torch.inf)
    victim = rank.argmin(-1, keepdim=True)
    return victim, (victim < usable) & (rank[..., -1:] > -torch.inf)


def _rank(
    state: StaticState,
    group: StaticGroup,
    block: Block,
    outgoing: OutgoingToken,
    score: Tensor | None,
    token: Token,
) -> Tensor:
    """Priority ``[B, Hb, C + 1]`` of what the block holds and, last, of the leaving token."""
    settings, rules, now, span = state.settings, state.rules, token.now, block.span
    head = torch.arange(span.start, span.stop, device=now.device)[None, :, None]
    start = token.start[:, None, None]
    own = outgoing.position.expand(-1, len(block.heads), -1)
    position = torch.cat([block.view(group.position).long(), own], -1)
    seen = settings.sees(now + 1, position, start)
    if seen is not None:
        position = position.masked_fill(~seen, EMPTY)
    scores = in_class = pinned = None
    if block.scored and score is not None and group.score is not None:
        first = group.span.start
        own_score = score[:, span.start - first : span.stop - first]
        scores = torch.cat([block.view(group.score), own_score], -1)
    elif block.classes:  # a head that keeps classes without scores holds nothing else
        only = (rules.classes[head] != 0) & ~rules.keeps_rest[head]
        held = only.expand(state.batch, -1, block.capacity)
        in_class = torch.cat([held, outgoing.in_class[:, span]], -1)
    if state.spans is not None:
        number = (position - start).unsqueeze(-1)
        low, high = state.spans[:, None, None].unbind(-1)
        pinned = ((number >= low) & (number < high)).any(-1)
    return priority(
        rules,
        settings.scorer,
        head,
        state.windows[:, span].unsqueeze(-1),
        position,
        scores,
        now + 1 - torch.maximum(position, state.first_vote),
        now,
        in_class,
        pinned,
    )
