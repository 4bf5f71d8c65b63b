"""16-bit weights against float64, at every size and on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvcompress.kernels.cpu.library import ISAS, library
from kvcompress.kernels.linear import bits16
from kvcompress.kernels.linear.bits16 import (
    MAX_ROWS,
    MAX_ROWS_AS_FLOATS,
    Linear16,
    most_rows,
    serve_16_bit,
)
from tests.runtime.models import build
from tests.runtime.test_fused import runs


@pytest.fixture(params=[isa for isa in ISAS if runs(isa)])
def isa(request):
    kernels = library()
    before = kernels.isa
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 31), (8, 32), (65, 130), (70, 1000), (9, 2816)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31, 64])
@torch.no_grad()
def test_sums_are_floats_rounded_once(isa, dtype, sizes, rows):
    outer, inner = sizes
    generator = torch.Generator().manual_seed(rows)
    layer = Linear16(inner, outer, bias=rows % 2 == 0).to(dtype)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    wanted = x.double() @ layer.weight.double().T
    wanted = wanted if layer.bias is None else wanted + layer.bias.double()
    got = layer(x)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps  # half of it is one rounding; the rest is for sums of floats
    torch.testing.assert_close(got.double(), wanted, rtol=0.6 * eps, atol=1e-4 * inner**0.5)


@torch.no_grad()
def test_a_model_keeps_its_tokens_its_ties_and_its_names():
    model = build("llama").to(torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    names = list(model.state_dict())
    ids = torch.arange(3, 23)[None]
    before = model.generate(ids, max_new_tokens=12, do_sample=False)
    serve_16_bit(model)
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.state_dict()) == names
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), before)


def test_more_rows_are_served_where_the_processor_multiplies_bfloat16(isa):
    in_pairs = library().multiplies_bf16
    assert not in_pairs or isa == "avx512-vnni"
    assert most_rows(torch.bfloat16) == (MAX_ROWS if in_pairs else MAX_ROWS_AS_FLOATS)
    assert most_rows(torch.float16) == MAX_ROWS_AS_FLOATS


def test_what_the_kernel_does_not_serve_is_torchs_own(monkeypatch):
    layer = Linear16(16, 8).to(torch.bfloat16)
    x = torch.randn(MAX_ROWS + 1, 16).to(torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    x = x[:1].requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        wide = torch.randn(1, 16)
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_multiplied_as_floats_where_those_are_faster(dtype, bias, monkeypatch):
    """Rounded once, as one sum of floats is; torch's own product of 16 bits is another."""
    monkeypatch.setattr(bits16, "compute_dtype", lambda device, stored: torch.float32)
    torch.manual_seed(0)
    layer = Linear16(96, 80, bias=bias).to(dtype)
    x = torch.randn(3, 100, 96).to(dtype).requires_grad_()
    wanted = x.double() @ layer.weight.double().T
    wanted = wanted + layer.bias.double() if bias else wanted
    got = layer(x)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=0.6 * eps, atol=1e-5)
    (slope,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(slope[0, 0], layer.weight.sum(0).to(dtype), rtol=2 * eps, atol=2e-2)


@torch.no_grad()
def test_where_16_bits_are_fast_torch_multiplies_them(monkeypatch):
    monkeypatch.setattr(bits16, "compute_dtype", lambda device, stored: stored)
    layer = Linear16(96, 80).to(torch.bfloat16)
    x = torch.randn(100, 96).to(torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
