"""Losses against attention with the codes and masks written out."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile.losses import Candidates, layer_losses, output_projection
from kvcompress.profile.masks import KeepMasks
from kvcompress.quant.codec import roundtrip
from kvcompress.recipe import Keep
from tests.profile.rows import random_rows

HEADS = (
    HeadPlan(),
    HeadPlan(full=True, k_dtype="model", v_dtype="model"),
    HeadPlan(full=True),
    HeadPlan(full=True, k_dtype="int8", v_dtype="int4"),
    HeadPlan(full=True, k_dtype="int4", v_dtype="int4"),
    HeadPlan(full=True, k_dtype="fp8", v_dtype="fp8"),
    HeadPlan(frequent=Budget(ratio=0.2), local=Budget(ratio=0.1)),
    HeadPlan(punct=True, k_dtype="int4", v_dtype="int4"),
)


class Attention(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, hidden, bias=False)


def measured(window=None):
    module = Attention(2 * 2 * 8, 24)
    rows = random_rows(module=module, window=window)
    none = torch.zeros(rows.key.shape[1], dtype=torch.bool)
    punct = none.clone()
    punct[::9] = True
    masks = KeepMasks(rows, Keep(), none, punct)
    center, scale = torch.randn(2, 8), torch.rand(2, 8) + 0.5
    (losses,) = layer_losses(rows, (center, scale), None, [(Candidates.of(HEADS), masks)])
    return rows, masks, center, scale, losses.detach()


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("number", range(len(HEADS)))
def test_loss_written_out(number, window):
    rows, masks, center, scale, losses = measured(window)
    plan, weight = HEADS[number], rows.module.o_proj.weight.detach()
    count = rows.query.shape[2]
    for head in range(2):
        c, s = center[head], scale[head]
        key = roundtrip((rows.key[head] - c) / s, plan.k_dtype) * s + c
        value = roundtrip(rows.value[head], plan.v_dtype)
        kept = masks.kept(plan).expand(2, -1, -1)[head]
        part = weight[:, head * 16 : (head + 1) * 16]
        total = 0.0
        for w in range(count):
            exact = masks.exact[w][:, None]
            k = torch.where(exact, rows.key[head], key)[kept[w]]
            v = torch.where(exact, rows.value[head], value)[kept[w]]
            out = (rows.query[head, :, w] @ k.T).softmax(-1) @ v
            delta = (out - rows.output[head, :, w]).flatten()
            whole = rows.output[:, :, w].flatten() @ weight.T
            total += float((part @ delta).square().sum() / whole.square().sum())
        assert float(losses[head, number]) == pytest.approx(total / count, rel=2e-3, abs=1e-9)


def test_fewer_bits_and_tokens_cost_more():
    losses = measured()[-1].mean(0).tolist()
    nothing, exact, int8, k8v4, int4, fp8, frequent, punct = losses
    assert exact < 1e-10 < int8 < fp8 < int4
    assert int8 < k8v4 < int4 < frequent < nothing
    assert punct < nothing


def test_output_projection_is_found_by_name_or_by_width():
    attention = Attention(32, 24)
    assert torch.equal(output_projection(attention, 32), attention.o_proj.weight)

    gpt2 = nn.Module()
    gpt2.c_attn, gpt2.c_proj = Conv1D(96, 32), Conv1D(24, 32)
    assert output_projection(gpt2, 32).shape == (24, 32)

    unnamed = nn.Module()
    unnamed.first, unnamed.last = nn.Linear(32, 96), nn.Linear(32, 24)
    assert output_projection(unnamed, 32).shape == (24, 32)
    assert output_projection(nn.Identity(), 32) is None


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("scratch_bytes", [1, 2**20, 2**28])
def test_loss_in_nats_written_out(window, scratch_bytes):
    """mean over rows of |u · Δo| from whole outputs in float64, however few rows fit at a time."""
    rows = random_rows(window=window)
    none = torch.zeros(rows.key.shape[1], dtype=torch.bool)
    punct = none.clone()
    punct[::9] = True
    masks = KeepMasks(rows, Keep(), none, punct)
    gradient = torch.randn_like(rows.output)
    center, scale = torch.randn(2, 8), torch.rand(2, 8) + 0.5
    settings = [(Candidates.of(HEADS), masks), (Candidates.of(HEADS[:2]), masks)]
    found, again = layer_losses(rows, (center, scale), gradient, settings, scratch_bytes)
    torch.testing.assert_close(found[:, :2], again)
    c, s = center[:, None].double(), scale[:, None].double()
    for column, head in enumerate(HEADS):
        key = roundtrip(((rows.key - c) / s).float(), head.k_dtype).double() * s + c
        value = roundtrip(rows.value, head.v_dtype).double()
        exact, kept = masks.exact, masks.kept(head).unsqueeze(1)
        q = rows.query.double()
        logits = torch.where(exact, q @ rows.key.double().mT.unsqueeze(1), q @ key.mT.unsqueeze(1))
        p = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        out = torch.einsum("hgws,hsd->hgwd", p * exact, rows.value.double())
        out += torch.einsum("hgws,hsd->hgwd", p * ~exact, value)
        expected = ((out - rows.output) * gradient).sum((1, 3)).abs().mean(-1)
        torch.testing.assert_close(found[:, column].double(), expected, rtol=1e-3, atol=2e-6)
