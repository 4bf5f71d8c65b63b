"""int8 rows against float64, at every size and on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvcompress.kernels.cpu.library import ISAS, library
from kvcompress.kernels.linear import int8 as linear8
from kvcompress.kernels.linear.int8 import Int8Embedding, Int8Linear, codes_of, quantize_linears
from tests.runtime.models import build
from tests.runtime.test_fused import runs


@pytest.fixture(params=[isa for isa in ISAS if runs(isa)])
def isa(request):
    kernels = library()
    before = kernels.isa
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


def exact(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    y = (x.double() @ layer.weight.double().T) * layer.scale.double()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("sizes", [(1, 1), (7, 63), (8, 64), (65, 130), (100, 1000), (9, 2816)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33])
@torch.no_grad()
def test_float32_activations_keep_16_bits(isa, sizes, rows):
    """Half a step of 2⁻¹⁶ of a row's range for each product, far less in sum."""
    generator = torch.Generator().manual_seed(rows)
    layer = Int8Linear(
        *codes_of(torch.randn(sizes, generator=generator)),
        torch.randn(sizes[0], generator=generator),
    )
    x = torch.randn(rows, sizes[1], generator=generator) + 2
    got, wanted = layer(x), exact(layer, x)
    span = (x.amax(1) - x.amin(1)).double()[:, None] / 2**16
    bound = span * (layer.weight.double().abs().sum(1) * layer.scale.double()) + 1e-4
    assert (got.double() - wanted).abs().le(bound).all()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=2e-4 * wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_rounds_once(isa, dtype):
    layer = Int8Linear(*codes_of(torch.randn(40, 96)), None)
    x = torch.randn(2, 3, 96).to(dtype)
    got, wanted = layer(x), exact(layer, x)
    assert got.dtype == dtype and got.shape == (2, 3, 40)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


@torch.no_grad()
def test_rows_that_do_not_lie_side_by_side(isa):
    layer = Int8Linear(*codes_of(torch.randn(10, 64)), None)
    x = torch.randn(5, 2, 128)[:, 1, :64]
    torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-3, atol=1e-3)
    turned = torch.randn(64, 4).T
    torch.testing.assert_close(layer(turned).double(), exact(layer, turned), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_outliers_cost_their_own_row_only():
    """A channel 1000 times the others leaves the products of other rows untouched."""
    layer = Int8Linear(*codes_of(torch.randn(16, 256)), None)
    x = torch.randn(2, 256)
    before = layer(x)[1]
    x[0, 5] = 1000.0
    assert torch.equal(layer(x)[1], before)


@pytest.mark.parametrize("kernels", [True, False])
@torch.no_grad()
def test_long_inputs_and_no_kernels(monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(linear8, "library", lambda: None)
    layer = Int8Linear(*codes_of(torch.randn(30, 50)), torch.randn(30))
    monkeypatch.setattr(linear8, "_WIDENED_ROWS", 7)
    for rows in (1, linear8.MAX_ROWS + 1):
        x = torch.randn(rows, 50)
        torch.testing.assert_close(layer(x).double(), exact(layer, x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_keeps_its_logits_and_its_ties():
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    ids = torch.arange(12)[None] + 3
    before = model(ids).logits
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    quantize_linears(model)
    assert not any(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
    embedding = model.model.embed_tokens
    assert isinstance(embedding, Int8Embedding)
    assert embedding.weight.data_ptr() == model.lm_head.weight.data_ptr()
    held = {b.data_ptr(): b.nbytes for b in model.buffers() if b.dtype == torch.int8}
    assert sum(held.values()) == weights, "a byte for every weight, the tied ones once"
    after = model(ids).logits
    assert (after - before).norm() / before.norm() < 0.05
    assert (model.model.embed_tokens(ids) - before.new_zeros(())).shape == (1, 12, 64)


@torch.no_grad()
def test_bitsandbytes_layers_give_the_same_products():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(48, 64)
    layer = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    codes, scale = codes_of(weight)
    layer.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.weight.SCB = scale * 127
    model = nn.Sequential(layer)
    linear8.serve_bitsandbytes(model)
    x = torch.randn(3, 64)
    wanted = x.double() @ (codes.double() * scale.double()[:, None]).T
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-3, atol=1e-3)
