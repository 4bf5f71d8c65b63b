"""One decoded token per row through a layer of the static cache: attend, evict, store.

`step.token_rule` on tensors alone, in place and of fixed shape, so that a compiler takes the step
into one graph and CUDA graphs can replay it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.runtime.layer.call import AttentionCall
from kvcompress.runtime.static.attend import Token, attend_token
from kvcompress.runtime.static.state import Block, StaticGroup, StaticState
from kvcompress.runtime.step.token_rule import (
    LeavingToken,
    Segments,
    encoded,
    ranked,
    take_exact_slot,
    weakest,
)
from kvcompress.runtime.store.segments import EMPTY, put_codes


def decode_step(
    state: StaticState, call: AttentionCall, valid: Tensor | None, flags: Tensor | None
) -> Tensor:
    """Attention of one token per row, then eviction and storage.

    Args:
        valid: ``[B]`` bool, None if no row gets padding.
        flags: ``[B]`` uint8 class flags, or None.

    Returns:
        ``[B, 1, Hq, Dv]`` contiguous, in the query's dtype.
    """
    query, key, value, sinks = call.query, call.key, call.value, call.sinks
    batch, heads = key.shape[:2]
    rows = (query.float() * call.scaling).reshape(batch, heads, -1, query.shape[-1])
    extra = None if sinks is None else sinks.float().view(heads, -1)
    if not state.ordered:
        rows, key, value = (t.index_select(1, state.heads) for t in (rows, key, value))
        extra = None if extra is None else extra.index_select(0, state.heads)
    now = state.counter - 1
    begins = state.start < 0 if valid is None else (state.start < 0) & valid
    start = torch.where(begins, now, state.start.long())
    token = Token(rows, key, value, now, start, valid, flags, call.softcap, extra)
    out, own_scores = attend_token(state, token)
    slot = _exact_slot(state)
    leaving = _leaving(state, token, slot)
    granted = _granted(state, token).unsqueeze(-1)
    for group, own_score in zip(state.groups, own_scores, strict=True):
        recent = slot - state.settings.sink_tokens
        score = None if group.recent_score is None else _recent(group.recent_score, recent)
        _store_in_group(state, group, leaving, score, granted, token)
        if group.recent_score is not None and own_score is not None and score is not None:
            stays = recent < 0 if valid is None else (recent < 0) | ~valid
            place = recent.clamp(min=0)[:, None, None].expand(score.shape)
            kept = torch.where(stays[:, None, None], score, own_score)
            group.recent_score.scatter_(2, place, kept)
    _take_in(state, token, leaving)
    if not state.ordered:
        out = out.index_select(1, state.restore)
    return out.to(query.dtype).flatten(1, 2).unsqueeze(1)


# ---- the exact slots
def _exact_slot(state: StaticState) -> Tensor:
    """``[B]`` where the token goes: the next free sink, or the oldest recent token's slot."""
    sinks = state.settings.sink_tokens
    oldest = state.exact_position[:, sinks:].argmin(1) + sinks
    if sinks:
        oldest = torch.where(state.row_seen < sinks, state.row_seen.long(), oldest)
    return oldest


def _recent(recent_score: Tensor, recent: Tensor) -> Tensor:
    """``[B, Hs, 1]`` scores in the slots ``[B]``."""
    place = recent.clamp(min=0)[:, None, None]
    return recent_score.gather(2, place.expand(*recent_score.shape[:2], 1))


def _leaving(state: StaticState, token: Token, slot: Tensor) -> LeavingToken:
    """What lies in the slot that the token takes; where the token is padding, nothing leaves.

    Its class is counted.
    """
    leaving = LeavingToken.at(state, slot)
    if token.valid is not None:
        leaving.position = leaving.position.masked_fill(~token.valid, EMPTY)
    if state.class_counts is not None:
        leaves = (leaving.position >= 0).to(torch.int32)
        state.class_counts.scatter_add_(1, leaving.flags[:, None], leaves[:, None])
    return leaving


def _take_in(state: StaticState, token: Token, leaving: LeavingToken) -> None:
    """The token takes its exact slot, which stays as it is where the token is padding."""
    key, value, now = token.key, token.value, token.now.expand(state.batch)
    flags = torch.zeros_like(leaving.flags) if token.flags is None else token.flags
    if token.valid is None:
        state.row_seen.add_(1)
    else:
        valid, wide = token.valid, token.valid[:, None, None, None]
        key = torch.where(wide, key, leaving.key.unsqueeze(2))
        value = torch.where(wide, value, leaving.value.unsqueeze(2))
        held = state.exact_position.gather(1, leaving.slot[:, None])[:, 0]
        now = torch.where(valid, now, held.long())
        flags = torch.where(valid, flags, leaving.flags)
        state.row_seen.add_(valid)
    take_exact_slot(state, leaving.slot, key, value, now, flags)
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


def _store_in_group(
    state: StaticState,
    group: StaticGroup,
    leaving: LeavingToken,
    score: Tensor | None,
    granted: Tensor,
    token: Token,
) -> None:
    """In each head the leaving token takes the slot of the lowest ranked one, or is dropped.

    Args:
        score: ``[B, Hs, 1]`` of the leaving token among the recent ones.
        granted: ``[B, Hkv, 1]``, see `_granted`.
    """
    span, rules = group.span, state.rules
    if score is not None:
        score = leaving.score(rules.classes[group.scored], score)
    in_class = leaving.in_class(rules.classes)
    victims, kept = [], []
    for block in group.blocks:
        usable = granted[:, block.span]
        victim, keeps = usable[..., 0].long(), usable[..., 0] > 0
        if block.capacity:
            own = _segments(state, group, block, (leaving.position, score, in_class), token)
            found = ranked(state.settings, rules, own, token.now, state.first_vote)
            victim, keeps = weakest(found.rank, usable)
        victims.append(victim)
        kept.append(keeps)
    slots, keeps = torch.cat(victims, 1) + group.base, torch.cat(kept, 1)
    spare = group.position.shape[0] - 1
    index = torch.where(keeps, slots, spare).flatten()
    pair = leaving.key[:, span], leaving.value[:, span]
    constants = state.center[span], state.scale[span]
    keys, values = encoded(*pair, constants, group.k_dtype, group.v_dtype)
    put_codes(group.keys, keys, index)
    put_codes(group.values, values, index)
    position = leaving.position[:, None].expand(-1, span.stop - span.start).to(torch.int32)
    group.position.index_copy_(0, index, position.flatten())
    if group.score is not None and score is not None:
        scored, spare = score.shape[1], group.score.shape[0] - 1
        index = torch.where(keeps[:, :scored], slots[:, :scored], spare).flatten()
        group.score.index_copy_(0, index, score.flatten())


def _segments(
    state: StaticState,
    group: StaticGroup,
    block: Block,
    own: tuple[Tensor, Tensor | None, Tensor],
    token: Token,
) -> Segments:
    """A block as the rule looks at it.

    Args:
        own: the leaving token's position ``[B]``, score ``[B, Hs, 1]`` and whether it is of a class
            of each head ``[B, Hkv, 1]``.
    """
    (position, score, in_class), span, first = own, block.span, group.span.start
    held = group.score if block.scored and score is not None else None
    return Segments(
        head=torch.arange(span.start, span.stop, device=position.device)[None, :, None],
        window=state.windows[:, span].unsqueeze(-1),
        start=token.start[:, None, None],
        bounds=None if state.spans is None else state.spans[:, None, None],
        position=block.view(group.position),
        own_position=position[:, None, None].expand(-1, len(block.heads), -1),
        score=None if held is None else block.view(held),
        own_score=None if score is None else score[:, span.start - first : span.stop - first],
        own_in_class=in_class[:, span] if block.classes and held is None else None,
    )
