"""The references of the kernels of a step: attention in float64, and the torch decode step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcompress.kernels.decode_split.reference import decode_pieces
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.static import triton_step as static_triton
from kvcompress.runtime.static.cache import StaticCompressedCache
from tests.kernels import by_reference
from tests.kernels.cases import SHAPES, check_split, split
from tests.runtime.models import build, prompts
from tests.runtime.static_compare import assert_same_arrays
from tests.runtime.test_static import HEADS, assert_equal, decode, plan_for

# float32 sums of codes up to 255 with their minimum: a relative error of about 1e-6 · 255
TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("k", "v", "dim", "value_dim", "rows"), SHAPES)
def test_split(k, v, dim, value_dim, rows):
    check_split(decode_pieces, split(k, v, dim, value_dim, rows), TOLERANCE)


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"window": 120}, {"block": 64}], ids=str)
def test_what_a_query_may_see(settings):
    check_split(decode_pieces, split("int8", "int4", 32, 32, 3, batch=2, **settings), TOLERANCE)


@pytest.mark.parametrize(
    ("family", "names", "settings"),
    [
        ("llama", ("fastgen", "full", "punct", "capped"), {"scorer": "lift"}),
        ("mistral", ("frequent", "special", "punct_local"), {"scorer": "raw"}),
        ("gemma2", ("capped_fastgen", "sink", "full"), {"scorer": "mean"}),
        ("gpt_oss", ("local", "frequent"), {"scorer": "random"}),
        ("llama4", ("full", "fastgen"), {}),
    ],
)
def test_a_step_by_the_references_equals_the_step_by_torch(family, names, settings, monkeypatch):
    """So what the kernels are held to is right, classes and protected spans included."""
    monkeypatch.setattr(static_triton, "triton_status", lambda device: by_reference.READY)
    monkeypatch.setattr(static_triton, "ops", by_reference)
    model, inputs = build(family), prompts(2, 30, [3, 0])
    plan = plan_for(model, *(HEADS[name] for name in names), **settings)
    attach(model, plan)
    spans = [[(0, 4), (10, 14)], []] if family == "llama" else ()
    ours, theirs = (
        StaticCompressedCache(plan, batch=2, max_tokens=60, protect=spans, kernels=kernels)
        for kernels in ("triton", "torch")
    )
    assert_equal(decode(model, model, ours, inputs, 9), decode(model, model, theirs, inputs, 9))
    assert_same_arrays(ours, theirs, tolerance=1e-5)
    assert ours.static_layers[0].tables is not None


def test_a_piece_is_never_longer_than_the_chunk():
    """Many short pieces and few long ones give the same step."""
    case = split("int8", "int8", 32, 32, 2, chunk=16, capacities=(37, 0, 90))
    lengths = case.pieces.work[:, 1].tolist()
    assert lengths == [16, 16, 5, *[16] * 5, 10]
    check_split(decode_pieces, case, TOLERANCE)
