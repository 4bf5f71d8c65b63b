"""compact_quantize and prefill_colsum in the interpreter, against codec and float64."""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.compact_quantize import reference as compact
from kvcompress.kernels.view import KeyConstants, PromptView, Reach, Softmax, VotersView
from kvcompress.quant.codec import value_groups
from tests.kernels.cases import awkward, empty_codes, random, same_codes


@pytest.mark.parametrize(
    ("k", "v", "dim", "value_dim", "dtype"),
    [
        ("int8", "int8", 64, 64, torch.float32),
        ("int4", "int4", 48, 192, torch.bfloat16),
        ("fp8", "fp8", 80, 96, torch.float16),
        ("model", "int4", 32, 256, torch.float32),
        ("int4", "model", 140, 132, torch.float32),
        ("fp8", "int8", 128, 256, torch.bfloat16),
        ("rot4", "rot3", 64, 128, torch.float32),
        ("rot3", "rot2", 8, 256, torch.bfloat16),
        ("rot2", "rot4", 32, 16, torch.float16),
    ],
)
def test_codes_are_those_of_the_codec_to_the_last_bit(k, v, dim, value_dim, dtype):
    from kvcompress.kernels.compact_quantize.triton import compact_quantize

    batch, heads, tokens, count = 2, 3, 13, 37
    key = awkward(batch, heads, tokens, dim, seed=1).to(dtype)
    value = awkward(batch, heads, tokens, value_dim, seed=2).to(dtype)
    value = value.transpose(1, 2).contiguous().transpose(1, 2)  # as a model lays it out
    index = torch.arange(count) * 2
    kept = torch.stack(
        [index // (heads * tokens), index // tokens % heads, index % tokens]
    )  # rows, heads, tokens
    slots = torch.randperm(count + 1, generator=torch.Generator().manual_seed(3))[:count]
    constants = random(heads, dim, seed=4), random(heads, dim, seed=5).abs() + 0.3
    results = []
    for kernel in (compact_quantize, compact.compact_quantize):
        keys = empty_codes(k, count + 1, dim, 1, dtype)
        values = empty_codes(v, count + 1, value_dim, value_groups(v, value_dim), dtype)
        kernel(PromptView(key, value, kept, slots), KeyConstants(*constants), keys, values)
        results.append((keys, values))
    for ours, theirs in zip(*results, strict=True):
        same_codes(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "dim", "window", "softcap", "dtype", "tolerance"),
    [
        (3, 48, 0, None, torch.float32, 1e-5),
        (1, 80, 7, 5.0, torch.float32, 1e-5),
        (2, 64, 0, None, torch.float16, 1e-5),  # products of float16 are exact in float32
    ],
)
def test_column_sums(rows, dim, window, softcap, dtype, tolerance):
    from kvcompress.kernels.prefill_colsum.triton import prefill_colsum

    batch, heads, tokens, chosen = 2, 2, 70, 37
    query = random(batch, heads * rows, chosen, dim, seed=1).to(dtype)
    key = random(batch, heads, tokens, dim, seed=2).to(dtype)
    position = torch.arange(17, 17 + chosen)  # the last of 16 rows sees one key of a tile
    weight, first = random(batch, chosen, seed=4).abs(), torch.tensor([0, 4])
    logits = query.double().unflatten(1, (heads, rows)) @ key.double().unsqueeze(2).mT * dim**-0.5
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    keys = torch.arange(tokens)
    visible = (keys <= position[:, None]) & (keys >= first[:, None, None])
    if window:
        visible &= keys > position[:, None] - window
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    expected = logits.sub(lse.unsqueeze(-1)).exp()
    expected = torch.einsum("bhgrt,br->bht", expected, weight.double())
    lse = lse.flatten(1, 2).float()
    voters = VotersView(query, key, lse, position, weight, first)
    got = prefill_colsum(voters, Softmax(dim**-0.5, softcap), Reach(window, 0)).double()
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
