"""The compiled decode step against the tensor operations that it stands for."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

from kvcompress.kernels.cpu import layout
from kvcompress.kernels.cpu.library import ISAS, library
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.step.cpu import EXCEPTIONS, refusal
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.storage import STORAGES

pytestmark = pytest.mark.skipif(library() is None, reason="the C kernels were not built")

STORAGE = (*STORAGES,)


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
        assert refusal(settings) is None
        self.fused, self.plain = CompressedLayer(settings), CompressedLayer(settings)
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
            layer.announce(ForwardInfo(flags=flags))
            layer.update(key, value)
            if layer is self.plain:
                layer.ready.fused = None
            given = {"mask": None, "scaling": shape.head_dim**-0.5, **more}
            out.append(layer.forward(AttentionCall(query, key, value, **given)).float())
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
            for a, b in (
                (ours.store.keys, theirs.store.keys),
                (ours.store.values, theirs.store.values),
            ):
                for x, y in ((a.data, b.data), (a.scale, b.scale), (a.minimum, b.minimum)):
                    assert (x is None) == (y is None)
                    assert x is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            if ours.store.score is not None:
                close = {"rtol": tolerance, "atol": tolerance}
                torch.testing.assert_close(ours.store.score, theirs.store.score, **close)
                torch.testing.assert_close(ours.recent_score, theirs.recent_score, **close)


def follow(
    pair: Pair, batch: int, tolerance: float, prompt: int = 90, steps: int = 40, **more
) -> None:
    """The same prompt and tokens through both, comparing every output and the state at the end."""
    pair.feed(batch, prompt, **more)
    for _ in range(steps):
        ours, theirs = pair.feed(batch, 1, **more)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    pair.compare(steps * tolerance)


def tolerance_of(isa: str, storage: tuple[str, str]) -> float:
    """Float32 sums, or 16 bits of queries and weights where codes are multiplied as integers: the
    keys here span about 10, so a logit's rounding error is near 1e-4 and a code's near 1e-2."""
    return 2e-3 if isa == "avx512-vnni" and set(storage) - {"model", "fp8"} else 1e-4


@pytest.mark.parametrize("storage", list(product(STORAGE, STORAGE)), ids="-".join)
@torch.no_grad()
def test_every_storage(isa, storage):
    """Positions, codes and classes to the last bit, outputs and scores within rounding."""
    pair = Pair(plan_of(some_heads(*storage), 48), groups=3)
    follow(pair, 2, tolerance_of(isa, storage), steps=25)


@pytest.mark.parametrize("dim", [4, 6, 40, 64, 80, 128, 130, 256, 320])
@pytest.mark.parametrize(
    "storage", [("int8", "int8"), ("int4", "int4"), ("model", "fp8")], ids="-".join
)
@torch.no_grad()
def test_any_head_dim(isa, storage, dim):
    value_dim = dim if dim != 80 else 48
    pair = Pair(plan_of(some_heads(*storage)[:3], dim, value_dim), groups=2)
    follow(pair, 1, tolerance_of(isa, storage), steps=12)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 64])
@torch.no_grad()
def test_any_number_of_queries(isa, groups):
    pair = Pair(plan_of(some_heads("int8", "int4")[:3], 64), groups=groups)
    follow(pair, 1, tolerance_of(isa, ("int8", "int4")), steps=8)


@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
@pytest.mark.parametrize(
    "scorer", ["raw", "mean", "lift", "random", "random_generated", "key_norm"]
)
@torch.no_grad()
def test_what_layers_see_and_scorers_want(kind, scorer):
    plan = plan_of(some_heads("int8", "int8"), 32, kind=kind, scorer=scorer, score_rows=9)
    settings = LayerSettings(plan, params_of(plan), 0)
    if refusal(settings) is not None:
        assert scorer in {"random", "random_generated", "key_norm"}, (
            "a scorer that adds up is served"
        )
        return
    follow(Pair(plan, groups=2), 3, 2e-3)


@pytest.mark.parametrize("prompt", [1, 2, 6, 7, 8])
@torch.no_grad()
def test_a_short_prompt(prompt):
    """Votes count before anything is coded."""
    follow(Pair(plan_of(some_heads("int8", "int8"), 32), groups=2), 2, 2e-3, prompt=prompt)


@torch.no_grad()
def test_softcap_and_sinks(isa):
    sinks = torch.tensor([0.3, -2.0, 1.5, 4.0, 0.0, 9.0])
    pair = Pair(plan_of(some_heads("int8", "model")[:3], 64), groups=2)
    follow(pair, 2, tolerance_of(isa, ("int8", "model")), softcap=5.0, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["model", "int8"])
@torch.no_grad()
def test_half_precision(isa, dtype, storage):
    """Outputs are rounded to the model's dtype at the very end."""
    pair = Pair(plan_of(some_heads(storage, storage), 64), groups=2, dtype=dtype)
    pair.feed(2, 70)
    for _ in range(20):
        ours, theirs = pair.feed(2, 1)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2e-3)
    pair.compare(5e-2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 24])
@torch.no_grad()
def test_many_chunks_and_threads(batch, threads):
    """Segments of several chunks, shared out over threads by chunk or by segment, alike."""
    heads = [
        HeadPlan(full=True),
        HeadPlan(frequent=Budget(tokens=1500)),
        HeadPlan(local=Budget(tokens=40)),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = Pair(plan_of(heads, 64, scorer="lift"), groups=2)
        follow(pair, batch, 2e-3, prompt=2100 if batch == 1 else 120, steps=3)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_attention_equals_float64(isa):
    """One softmax in float64 over the decoded codes, the exact tokens and the token itself."""
    pair = Pair(plan_of(some_heads("int8", "int4")[:2], 96), groups=3)
    pair.feed(1, 333)
    state = copy.deepcopy(pair.plain.state)
    rand_state = pair.generator.get_state()
    ours, _ = pair.feed(1, 1)
    pair.generator.set_state(rand_state)
    query = (torch.randn(1, 1, 6, 96, generator=pair.generator) * 2 + 0.3).transpose(1, 2)
    key = (torch.randn(1, 1, 2, 96, generator=pair.generator) * 2 + 0.3).transpose(1, 2)
    value = (torch.randn(1, 1, 2, 96, generator=pair.generator) * 2 + 0.3).transpose(1, 2)
    center, scale = state.key_constants()
    for group in state.groups:
        for bucket in group.store.buckets():
            keys, values = group.store.decoded(bucket)
            for place, member in enumerate(bucket.head.tolist()):
                head = group.heads[member]
                held = bucket.position[place] >= 0
                k = keys[place, held].double() * scale[head] + center[head]
                k = torch.cat([k, state.exact_k[0, head].double(), key[0, head].double()])
                v = torch.cat(
                    [values[place, held], state.exact_v[0, head], value[0, head]]
                ).double()
                for g in range(3):
                    row = query[0, head * 3 + g, 0].double()
                    wanted = (k @ row * 96**-0.5).softmax(-1) @ v
                    error = (ours[0, 0, head * 3 + g].double() - wanted).abs().max()
                    assert error < tolerance_of(isa, ("int8", "int4"))


@torch.no_grad()
def test_codes_are_those_of_the_codec(isa):
    """`compare` above, on vectors that are hard to encode: constant, huge, tiny, negative zero."""
    plan = plan_of([HeadPlan(full=True, k_dtype=d, v_dtype=d) for d in STORAGE], 8, recent_tokens=1)
    pair = Pair(plan, groups=1)
    pair.feed(1, 4)
    heads = len(STORAGE)
    hard = torch.tensor([0.0, -0.0, 1.0, 1e-7, -3e4, 6e4, 7e4, 1e-30])
    for number in range(12):
        vectors = (
            hard.roll(number).repeat(heads, 1)
            if number % 3
            else torch.full((heads, 8), hard[number % 8])
        )
        vectors = vectors[None, :, None]
        for layer in (pair.fused, pair.plain):
            layer.announce(ForwardInfo())
            layer.update(vectors, vectors)
            layer.forward(AttentionCall(vectors * 0, vectors, vectors, None, 1.0))
    pair.compare(1e-5)


def test_what_is_refused_says_why():
    plan = plan_of(some_heads("int8", "int8"), 32)
    assert refusal(LayerSettings(plan, None, 0)) is None
    turns = LayerSettings(plan.model_copy(update={"turn_tokens": 3}), None, 0)
    assert refusal(turns) == "turn quotas"
    vote = LayerSettings(plan.model_copy(update={"scorer": "vote"}), None, 0)
    assert refusal(vote) == "the scorer 'vote'"


HALF, ROWS = torch.float64, layout.MAX_ROWS + 1
NOT_SERVED = {
    "a cache with protected spans": lambda state, query: (
        replace(state, spans=[(range(3, 9),)]), query),
    "a layer on another device than the CPU": lambda state, query: (state, query.to("meta")),
    "queries and keys of other or different dtypes": lambda state, query: (state, query.to(HALF)),
    f"more than {layout.MAX_ROWS} query heads for a KV head": lambda state, query: (
        state, query.repeat(1, ROWS, 1, 1)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("reason", EXCEPTIONS)
def test_what_the_kernels_leave_to_tensor_operations_is_named(reason):
    """The gate that every token passes and `doctor` name the same reasons."""
    plan = plan_of(some_heads("int8", "int8"), 32)
    layer = CompressedLayer(LayerSettings(plan, params_of(plan), 0))
    x = torch.randn(1, 5, 60, 32)
    layer.announce(ForwardInfo())
    layer.update(x, x)
    layer.forward(AttentionCall(x, x, x, None, 1.0))
    token = torch.randn(1, 5, 1, 32)
    assert refusal(layer.settings, layer.state, token) is None
    assert refusal(layer.settings, *NOT_SERVED[reason](layer.state, token)) == reason


@torch.no_grad()
def test_protected_spans_go_the_other_way():
    plan = plan_of(some_heads("int8", "int8"), 32)
    layer = CompressedLayer(LayerSettings(plan, params_of(plan), 0), (range(3, 9),))
    x = torch.randn(1, 5, 60, 32)
    layer.announce(ForwardInfo())
    layer.update(x, x)
    layer.forward(AttentionCall(x, x, x, None, 1.0))
    token = torch.randn(1, 5, 1, 32)
    layer.announce(ForwardInfo())
    layer.update(token, token)
    layer.forward(AttentionCall(token, token, token, None, 1.0))
    assert layer.ready.fused is not None and layer.ready.fused._view is None
