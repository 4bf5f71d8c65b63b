"""decode_split and decode_combine in the interpreter, against float64 attention."""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.decode_combine import flat
from tests.kernels import cases
from tests.kernels.cases import SHAPES, check_split, random, run_split, split

# float32 sums of codes up to 255 with their minimum: a relative error of about 1e-6 · 255
TOLERANCE = 5e-5
# the query and the weights of values are float16 there: 2**-12 of logits up to about 10
HALF = 4e-3


@pytest.mark.parametrize(("k", "v", "dim", "value_dim", "rows"), SHAPES)
def test_split_in_float32(k, v, dim, value_dim, rows):
    from kvcompress.kernels.decode_split.triton import decode_split

    check_split(decode_split, split(k, v, dim, value_dim, rows), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["model", "int8", "int4", "fp8"])
def test_split_in_half_precision(storage, dtype):
    from kvcompress.kernels.decode_split.triton import decode_split

    case = split(storage, storage, 64, 64, 4, dtype, capacities=(40,))
    check_split(decode_split, case, HALF)


@pytest.mark.parametrize(
    "settings",
    [
        {"softcap": 5.0},
        {"window": 120},
        {"block": 64, "batch": 2},
        {"chunk": 128, "capacities": (130,)},
    ],
    ids=str,
)
def test_what_a_query_may_see(settings):
    from kvcompress.kernels.decode_split.triton import decode_split

    check_split(decode_split, split("int8", "int4", 32, 32, 3, **settings), TOLERANCE)


@pytest.mark.parametrize(("magnitude", "tolerance"), [(1e-3, 1e-5), (1e4, 40.0)])
def test_values_of_any_magnitude_in_float16(magnitude, tolerance):
    """Weights of values are scaled into float16's range: neither lost nor infinite."""
    from kvcompress.kernels.decode_split.triton import decode_split

    case = split("int8", "int8", 32, 32, 2, torch.float16, capacities=(40,))
    values = case.arguments["values"]
    for part in (values.scale, values.minimum):
        part.copy_((part.float() * magnitude).clamp(max=6e4).half())
    from kvcompress.quant.codec import decode

    case.values = decode(values, "int8", 32)[:-1].double()
    found = run_split(decode_split, case)
    mine = found["accumulated"][1] / found["total"][1].unsqueeze(-1)
    torch.testing.assert_close(mine.double(), case.expected()[0][0], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("settings", "with_sinks", "padded"),
    [({}, False, False), ({"softcap": 5.0}, True, True), ({"window": 120}, False, True)],
)
def test_combine(settings, with_sinks, padded):
    from kvcompress.kernels.decode_combine.triton import decode_combine

    rows, dim, value_dim, exact, batch = 3, 48, 80, 19, 2
    case = split("int8", "int8", dim, value_dim, rows, batch=batch, chunk=64, **settings)
    parts = cases.run_split(_reference_split, case)
    a = case.arguments
    heads = len(a["heads"])
    chunks = torch.zeros(batch, heads, 2, dtype=torch.int64)
    for number, (_, _, row, head) in enumerate(a["work"].tolist()):
        if not chunks[row, head, 1]:
            chunks[row, head, 0] = 1 + number
        chunks[row, head, 1] += 1
    position = torch.arange(cases.NOW - exact, cases.NOW, dtype=torch.int32).repeat(batch, 1)
    position[1, 4:] = -1
    arguments = {
        "query": a["query"],
        "key": random(batch, heads, 1, dim, seed=6),
        "value": random(batch, 1, heads, value_dim, seed=7).transpose(1, 2),
        "exact_k": random(batch, heads, exact, dim, seed=8),
        "exact_v": random(batch, heads, exact, value_dim, seed=9),
        "exact_position": position,
        "heads": a["heads"],
        **{name: parts[name] for name in ("accumulated", "maximum", "total")},
        "chunks": chunks,
        "start": a["start"],
        "seen": a["seen"],
        "valid": torch.tensor([True, False]) if padded else None,
        "sinks": random(heads * rows, seed=10) if with_sinks else None,
        "scaling": a["scaling"],
        **{name: a[name] for name in ("softcap", "window", "block")},
    }
    for mine, expected in zip(
        decode_combine(**arguments), flat.decode_combine(**arguments), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_combine_of_nothing_is_zero():
    from kvcompress.kernels.decode_combine.triton import decode_combine

    nothing = torch.full((1, 4), -1, dtype=torch.int32)
    out, lse, _ = decode_combine(
        query=random(1, 2, 1, 16, seed=1),
        key=random(1, 1, 1, 16, seed=2),
        value=random(1, 1, 1, 16, seed=3),
        exact_k=random(1, 1, 4, 16, seed=4),
        exact_v=random(1, 1, 4, 16, seed=5),
        exact_position=nothing,
        heads=torch.tensor([0]),
        accumulated=torch.zeros(1, 2, 16),
        maximum=torch.full((1, 2), -torch.inf),
        total=torch.zeros(1, 2),
        chunks=torch.tensor([[[0, 1]]]),
        start=torch.tensor([-1], dtype=torch.int32),
        seen=torch.tensor(5),
        valid=torch.tensor([False]),
        sinks=None,
        scaling=0.25,
        softcap=0.0,
        window=0,
        block=0,
    )
    assert torch.equal(out, torch.zeros(1, 1, 2, 16))
    assert (lse == -torch.inf).all()


def _reference_split(**arguments):
    from kvcompress.kernels.decode_split.flat import decode_split

    decode_split(**arguments)
