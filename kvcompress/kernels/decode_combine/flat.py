"""Reference of the flat form of `decode_combine`, by one softmax over everything."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.decode_split.flat import sees


def decode_combine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    exact_position: Tensor,
    heads: Tensor,
    accumulated: Tensor,
    maximum: Tensor,
    total: Tensor,
    chunks: Tensor,
    start: Tensor,
    seen: Tensor,
    valid: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of codes, the exact tokens, the token itself and learned sinks in one softmax.

    Args:
        query, key, value: ``[B, Hq or Hkv, 1, ·]`` of the token, in the model's order of heads.
        exact_k, exact_v: ``[B, H, E, ·]`` in the layer's own order `heads`.
        exact_position: ``[B, E]`` int32, −1 where empty.
        accumulated, maximum, total: of all pieces, see `decode_split`.
        chunks: ``[B, H, 2]`` int64, first piece of each segment and their number.
        start, seen, softcap, window, block: as for `decode_split`.
        valid: ``[B]`` bool, False where the token is padding; or None.
        sinks: ``[Hq]`` logits that join without a value, or None.

    Returns:
        The output ``[B, 1, Hq, Dv]`` in the query's dtype; the log of the softmax's sum
        ``[B, H, G]`` float32, −inf where nothing is seen; logits ``[B, H, G, E + 1]`` of the exact
        tokens and, last, the token.
    """
    batch, kv_heads, exact, _ = exact_k.shape
    group = query.shape[1] // kv_heads
    q = query[:, :, 0].unflatten(1, (kv_heads, group))[:, heads].float() * scaling
    k = torch.cat([exact_k, key[:, heads]], 2).float()
    v = torch.cat([exact_v, value[:, heads]], 2).float()
    seen_exact = sees(seen - 1, exact_position.long(), start[:, None].long(), window, block)
    own = torch.ones_like(seen_exact[:, :1]) if valid is None else valid[:, None]
    visible = torch.cat([seen_exact, own], 1)[:, None, None]
    logits = q @ k.mT
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~visible, -torch.inf)
    out = query.new_zeros(batch, 1, kv_heads * group, v.shape[-1])
    lse = logits.new_empty(batch, kv_heads, group)
    for b in range(batch):
        for h in range(kv_heads):
            first, count = chunks[b, h].tolist()
            parts = slice(first, first + count)
            tops = [maximum[parts].T, logits[b, h]]
            sums = [total[parts].T, torch.ones_like(logits[b, h])]
            numbers = [accumulated[parts].transpose(0, 1), v[b, h].expand(group, -1, -1)]
            model_head = int(heads[h])
            if sinks is not None:
                tops.append(sinks.view(kv_heads, group)[model_head, :, None].float())
                sums.append(torch.ones_like(tops[-1]))
                numbers.append(torch.zeros_like(numbers[-1][:, :1]))
            top, amount = torch.cat(tops, 1), torch.cat(sums, 1)
            shift = top.amax(1, keepdim=True)
            weight = torch.exp(top - shift.masked_fill(shift == -torch.inf, 0.0))
            whole = (weight * amount).sum(1)
            number = (weight.unsqueeze(-1) * torch.cat(numbers, 1)).sum(1)
            number = number / whole.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
            at = slice(model_head * group, (model_head + 1) * group)
            out[b, 0, at] = number.to(out.dtype)
            lse[b, h] = shift[:, 0] + whole.log()
    return out, lse, logits
