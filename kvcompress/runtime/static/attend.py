"""Attention of one decoded token per row over the fixed arrays, and the scores that it leaves.

Tensor operations alone, of fixed shape, so that a compiler takes them into one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.decode_split.reference import Partial, decode_split
from kvcompress.plan import KVDtype
from kvcompress.quant.codec import Codes, channel_parts, turned
from kvcompress.runtime.static.state import Block, StaticGroup, StaticState


@dataclass(slots=True)
class Token:
    """The token of each row that arrives.

    Attributes:
        query: ``[B, Hkv, G, D]`` float32, scaled.
        key, value: ``[B, Hkv, 1, D]``; heads in the order of the state.
        now: int64 scalar, its position.
        start: ``[B]`` int64 position of the row's first real token, this one included.
        valid: ``[B]`` bool, False where it is padding; None where no row has any.
        flags: ``[B]`` uint8 class flags, or None.
        softcap: of the logits.
        sinks: ``[Hkv, G]`` learned logits that join every softmax without a value, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    now: Tensor
    start: Tensor
    valid: Tensor | None
    flags: Tensor | None
    softcap: float | None
    sinks: Tensor | None


def attend_token(state: StaticState, token: Token) -> tuple[Tensor, list[Tensor | None]]:
    """Output ``[B, Hkv, G, Dv]`` float32, and per group the token's own score ``[B, Hs, 1]``.

    Scores of stored and recent tokens are raised in place.
    """
    exact = _attend_exact(state, token)
    query = token.query * state.scale.unsqueeze(1)
    offset = (token.query * state.center.unsqueeze(1)).sum(-1)
    parts = [
        _attend_block(group, block, query, offset, token, state)
        for group in state.groups
        for block in group.blocks
    ]
    maximum = torch.cat([part.maximum for part in parts], 1)
    top = torch.maximum(exact.maximum, maximum)
    if token.sinks is not None:
        top = torch.maximum(top, token.sinks)
    top = _finite(top)
    here, there = torch.exp(exact.maximum - top), torch.exp(maximum - top)
    total = exact.total * here + torch.cat([part.total for part in parts], 1) * there
    if token.sinks is not None:
        total = total + torch.exp(token.sinks - top)
    total = total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    coded = torch.cat([part.accumulated for part in parts], 1)
    out = (exact.accumulated * here.unsqueeze(-1) + coded * there.unsqueeze(-1)) / total
    logits = iter([part.logits for part in parts])
    return out, [
        _raise_scores(
            state,
            group,
            token,
            exact.logits,
            [next(logits) for _ in group.blocks],
            top.unsqueeze(-1),
            total,
        )
        for group in state.groups
    ]


def _raise_scores(
    state: StaticState,
    group: StaticGroup,
    token: Token,
    exact: Tensor,
    coded: list[Tensor],
    top: Tensor,
    total: Tensor,
) -> Tensor | None:
    """Add the token's attention to the scores of a group.

    Args:
        exact, coded: logits ``[B, H, G, …]`` of all heads' exact slots, and of each block.
        top, total: ``[B, H, G, 1]`` of the whole softmax.
    """
    if group.recent_score is None or group.score is None:
        return None
    scorer, scored = state.settings.scorer, group.scored
    key = token.key[:, scored]
    shape = key.shape[:-1]
    own = scorer.initial(key, token.now.expand(shape), state.heads[scored, None].expand(shape))
    if not scorer.uses_attention:
        return own
    weight = scorer.row_weight(token.now - token.start) / token.query.shape[2]
    if token.valid is not None:
        weight = weight * token.valid
    share = weight[:, None, None, None] / total

    def sums(logits: Tensor, span: slice) -> Tensor:
        return (torch.exp(logits - top[:, span]) * share[:, span]).sum(2)

    for block, logits in zip(group.blocks, coded, strict=True):
        if block.scored and block.capacity:
            block.view(group.score).add_(sums(logits, block.span))
    raised = sums(exact[:, scored], scored)
    group.recent_score.add_(raised[..., state.settings.sink_tokens : -1])
    return own + raised[..., -1:]


def _visible(state: StaticState, token: Token, position: Tensor) -> Tensor:
    """Which stored tokens ``[B, 1 or H, N]`` the query may see."""
    inside = state.settings.sees(token.now, position, token.start[:, None, None])
    return position >= 0 if inside is None else (position >= 0) & inside


def _attend_exact(state: StaticState, token: Token) -> Partial:
    """Over the exact slots and, last, the token itself."""
    visible = _visible(state, token, state.exact_position.unsqueeze(1))
    own = visible.new_ones(state.batch) if token.valid is None else token.valid
    visible = torch.cat([visible, own[:, None, None]], -1)
    return _part(
        token.query,
        None,
        Codes(torch.cat([state.exact_k, token.key], 2), None, None),
        Codes(torch.cat([state.exact_v, token.value], 2), None, None),
        ("model", "model"),
        visible.expand(-1, token.key.shape[1], -1),
        token.softcap,
    )


def _attend_block(
    group: StaticGroup,
    block: Block,
    query: Tensor,
    offset: Tensor,
    token: Token,
    state: StaticState,
) -> Partial:
    query = query[:, block.span]
    if not block.capacity:
        nothing = query.new_zeros(query.shape[:-1])
        values = query.new_zeros(*query.shape[:-1], token.value.shape[-1])
        return Partial(values, nothing - torch.inf, nothing, nothing.unsqueeze(-1))
    return _part(
        query,
        offset[:, block.span],
        group.keys.each(block.view),
        group.values.each(block.view),
        (group.k_dtype, group.v_dtype),
        _visible(state, token, block.view(group.position)),
        token.softcap,
    )


def _part(
    query: Tensor,
    offset: Tensor | None,
    keys: Codes,
    values: Codes,
    dtypes: tuple[KVDtype, KVDtype],
    visible: Tensor,
    softcap: float | None,
) -> Partial:
    """`decode_split` with ``[B, H]`` in place of segments.

    In a compiled graph it is written as sums that the compiler fuses with the widening of the
    codes, so that no float copy of them is built there either.

    Args:
        query: ``[B, H, G, D]``.
        visible: ``[B, H, C]``.
    """
    if not torch.compiler.is_compiling():
        part = decode_split(
            query.flatten(0, 1),
            None if offset is None else offset.flatten(0, 1),
            keys.each(lambda t: t.flatten(0, 1)),
            values.each(lambda t: t.flatten(0, 1)),
            *dtypes,
            visible.flatten(0, 1).unsqueeze(1),
            softcap,
        )
        shape = query.shape[:2]
        return Partial(
            part.accumulated.unflatten(0, shape),
            part.maximum.unflatten(0, shape),
            part.total.unflatten(0, shape),
            part.logits.unflatten(0, shape),
        )
    logits = _fused_logits(query, offset, keys, dtypes[0])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    maximum = logits.amax(-1)
    weights = torch.exp(logits - _finite(maximum).unsqueeze(-1))
    return Partial(_fused_values(weights, values, dtypes[1]), maximum, weights.sum(-1), logits)


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _widened(codes: Codes, dtype: KVDtype) -> list[Tensor]:
    """``[B, H, 1, C, …]`` float32: all channels, or the low and the high half of them."""
    return [part.float() for part in channel_parts(codes.data.unsqueeze(2), dtype)]


def _fused_logits(query: Tensor, offset: Tensor | None, keys: Codes, dtype: KVDtype) -> Tensor:
    parts, query = _widened(keys, dtype), turned(query, dtype)
    pieces = query.unsqueeze(3).chunk(len(parts), -1)
    sums = [(piece * part).sum(-1) for piece, part in zip(pieces, parts, strict=True)]
    logits = sum(sums[1:], start=sums[0])
    if keys.scale is not None:
        logits = logits * keys.scale.float().mT
    if keys.minimum is not None:
        logits = logits + query.sum(-1, keepdim=True) * keys.minimum.float().mT
    return logits if offset is None else logits + offset.unsqueeze(-1)


def _fused_values(weights: Tensor, values: Codes, dtype: KVDtype) -> Tensor:
    parts = _widened(values, dtype)
    weights = weights.unsqueeze(-1)
    if values.scale is None:
        return (weights * parts[0]).sum(3)
    dim = parts[0].shape[-1] * len(parts)
    scales = _per_channel(values.scale, dim).unsqueeze(2).chunk(len(parts), -1)
    sums = [(weights * scale * part).sum(3) for scale, part in zip(scales, parts, strict=True)]
    out = sums[0] if len(sums) == 1 else torch.cat(sums, -1)
    if values.minimum is None:
        return turned(out, dtype)
    return out + (weights * _per_channel(values.minimum, dim).unsqueeze(2)).sum(3)


def _per_channel(groups: Tensor, dim: int) -> Tensor:
    """``[..., D]`` float32 from one number for each of equal groups of channels."""
    groups = groups.float()
    if groups.shape[-1] == 1:
        return groups.expand(*groups.shape[:-1], dim)
    width = dim // groups.shape[-1]
    return groups.unsqueeze(-1).expand(*groups.shape, width).flatten(-2)
