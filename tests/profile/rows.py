"""One layer's rows made by hand, for oracles."""

import torch
from torch import nn

from kvcompress.profile.collect import LayerRows, RunningScores, attend, held_out_rows
from kvcompress.profile.hf import LayerInput, Softmax
from kvcompress.recipe import Keep


def rows_of(query, key, value=None, keep=None, window=None, module=None):
    """`LayerRows` for query ``[Hkv, G, S, D]`` and key ``[Hkv, S, D]``, unit scaling."""
    value = torch.randn_like(key) if value is None else value
    held = held_out_rows(key.shape[1])
    softmax = Softmax(1.0, None, window)
    given = LayerInput(0, module or nn.Identity(), softmax, query, key, value)
    scores = RunningScores(keep or Keep(), given, key.shape[1] - held)
    out = attend(given, scores)
    return LayerRows(
        layer=0,
        module=given.module,
        softmax=softmax,
        query=query[:, :, -held:],
        key=key,
        value=value,
        output=out[:, :, -held:],
        prompt_tokens=key.shape[1] - held,
        ranks=scores.ranks(),
        residual=torch.zeros(held, 24),
    )


def random_rows(heads=2, groups=2, tokens=200, dim=8, **settings):
    torch.manual_seed(0)
    query = torch.randn(heads, groups, tokens, dim)
    return rows_of(query, torch.randn(heads, tokens, dim), **settings)


def attention_of(rows):
    """``[Hkv, G, W, S]`` attention of the held-out rows, in float64."""
    logits = rows.query.double() @ rows.key.double().mT.unsqueeze(1)
    seen = rows.softmax.visible(
        rows.prompt_tokens, rows.query.shape[2], rows.key.shape[1], rows.key.device
    )
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)
