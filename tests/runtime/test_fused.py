"""The compiled decode step against the tensor operations that it stands for."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from kvcompress.kernels.cpu.library import ISAS, library
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.fused import refusal
from kvcompress.runtime.layer import CompressedLayer
from kvcompress.runtime.protocol import Arrival
from kvcompress.runtime.state import LayerSettings

pytestmark = pytest.mark.skipif(library() is None, reason="the C kernels were not built")

STORAGE = ("model", "int8", "int4", "fp8")


def runs(isa: str) -> bool:
    kernels = library()
    if kernels is None:
        return False
    before = kernels.isa
    try:
        kernels.use_isa(isa)
    except ValueError:
        return False
    kernels.use_isa(before)
    return True


@pytest.fixture(params=[isa for isa in ISAS if runs(isa)])
def isa(request):
    kernels = library()
    before = kernels.isa
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


def plan_of(heads: list[HeadPlan], dim: int, value_dim: int | None = None, **more) -> Plan:
    kind = more.pop("kind", "full")
    shape = ModelShape(
        model_type="tiny", config_hash="0", layers=1, query_heads=len(heads), kv_heads=len(heads),
        head_dim=dim, value_dim=value_dim, sliding_windows=(None if kind == "full" else 40,),
        layer_kinds=(kind,), model_dtype_bytes=4, max_position=8192,
    )  # fmt: skip
    settings = {"sink_tokens": 2, "recent_tokens": 5, "special_ids": (1,), "punct_ids": (2,)}
    return Plan(model=shape, heads=(tuple(heads),), max_position=8192, **{**settings, **more})


def some_heads(k_dtype: str, v_dtype: str) -> list[HeadPlan]:
    kinds = {"k_dtype": k_dtype, "v_dtype": v_dtype}
    return [
        HeadPlan(full=True, **kinds),
        HeadPlan(frequent=Budget(tokens=19), local=Budget(tokens=9), **kinds),
        HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.3), cap=30, **kinds),
        HeadPlan(local=Budget(tokens=11), **kinds),
        HeadPlan(special=True, **kinds),
    ]


def params_of(plan: Plan) -> KVParams:
    generator = torch.Generator().manual_seed(3)
    shape = (1, plan.model.kv_heads, plan.model.head_dim)
    center = torch.randn(shape, generator=generator)
    scale = torch.rand(shape, generator=generator) + 0.5
    return KVParams(center, scale)


class Pair:
    """The same tokens through a layer with the kernels and one without."""

    def __init__(self, plan: Plan, groups: int, dtype: torch.dtype = torch.float32) -> None:
        settings = LayerSettings(plan, params_of(plan), 0)
        self.fused, self.plain = CompressedLayer(settings), CompressedLayer(settings)
        assert self.fused._fused is not None
        self.plain._fused = None
        self.plan, self.groups, self.dtype = plan, groups, dtype
        self.generator = torch.Generator().manual_seed(11)

    def feed(self, batch: int, length: int, **more) -> tuple[torch.Tensor, torch.Tensor]:
        shape, rand = self.plan.model, self.generator
        heads = shape.kv_heads

        def some(count: int, dim: int) -> torch.Tensor:
            x = torch.randn(batch, length, count, dim, generator=rand)
            return (x * 2 + 0.3).to(self.dtype).transpose(1, 2)

        query, key = some(heads * self.groups, shape.head_dim), some(heads, shape.head_dim)
        value = some(heads, shape.v_dim)
        flags = torch.randint(0, 9, (batch, length), generator=rand)
        flags = torch.where(flags > 3, 0, flags).to(torch.uint8)
        out = []
        for layer in (self.fused, self.plain):
            layer.arrival = Arrival(flags=flags)
            layer.update(key, value)
            given = {"softcap": None, "sinks": None, "mask": None, **more}
            result = layer.forward(
                query, key, value, given["mask"], shape.head_dim**-0.5, given["softcap"], None,
                given["sinks"],
            )  # fmt: skip
            out.append(result.float())
        return out[0], out[1]

    def compare(self, tolerance: float) -> None:
        fused, plain = self.fused.state, self.plain.state
        assert fused.row_seen == plain.row_seen
        assert fused.class_counts == plain.class_counts
        assert torch.equal(fused.exact_position, plain.exact_position)
        assert torch.equal(fused.exact_k, plain.exact_k)
        assert torch.equal(fused.exact_v, plain.exact_v)
        if fused.exact_class is not None:
            assert torch.equal(fused.exact_class, plain.exact_class)
        for ours, theirs in zip(fused.groups, plain.groups, strict=True):
            assert ours.store.capacities == theirs.store.capacities
            assert torch.equal(ours.store.position, theirs.store.position)
            for a, b in ((ours.store.keys, theirs.store.keys), (ours.store.values, theirs.store.values)):
                for x, y in ((a.data, b.data), (a.scale, b.scale), (a.minimum, b.minimum)):
                    assert (x is None) == (y is None)
                    assert x is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            if ours.store.score is not None:
                close = {"rtol": tolerance, "atol": tolerance}
                torch.testing.assert_close(ours.store.score, theirs.store.score, **close)
                torch.testing.assert_close(ours.recent_score, theirs.recent_score, **close)


@pytest.mark.parametrize("storage", list(product(STORAGE, STORAGE)), ids="-".join)
@torch.no_grad()
def test_equals_the_tensor_operations(isa, storage):
    """Positions, codes and classes to the last bit; outputs and scores as close as float32, or as
    16 bits of the query where codes are multiplied as integers."""
    integers = isa == "avx512-vnni" and {"int8", "int4"} & set(storage)
    tolerance = 2e-3 if integers else 2e-5
    pair = Pair(plan_of(some_heads(*storage), 48), groups=3)
    pair.feed(2, 90)
    for _ in range(50):
        ours, theirs = pair.feed(2, 1)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    pair.compare(50 * tolerance)
