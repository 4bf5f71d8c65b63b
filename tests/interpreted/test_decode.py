"""decode_pieces and decode_combine in the interpreter, against float64 attention."""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.decode_combine import reference
from kvcompress.kernels.decode_split import reference as split_reference
from kvcompress.kernels.view import (
    ExactView,
    HeadsView,
    KeyConstants,
    PartsView,
    Reach,
    RowsView,
    Softmax,
    TokenView,
)
from kvcompress.quant.codec import Codes, decode
from kvcompress.storage import STORAGES
from tests.kernels import cases
from tests.kernels.cases import SHAPES, check_split, random, split

# float32 sums of codes up to 255 with their minimum: a relative error of about 1e-6 · 255
TOLERANCE = 5e-5
# the query and the weights of values are float16 there: 2**-12 of logits up to about 10
HALF = 4e-3


@pytest.mark.parametrize(("k", "v", "dim", "value_dim", "rows"), SHAPES)
def test_split_in_float32(k, v, dim, value_dim, rows):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    check_split(decode_pieces, split(k, v, dim, value_dim, rows), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
def test_split_in_half_precision(storage, dtype):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split(storage, storage, 64, 64, 4, dtype, capacities=(40,))
    check_split(decode_pieces, case, HALF)


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
    from kvcompress.kernels.decode_split.triton import decode_pieces

    check_split(decode_pieces, split("int8", "int4", 32, 32, 3, **settings), TOLERANCE)


@pytest.mark.parametrize(("magnitude", "tolerance"), [(1e-3, 1e-5), (1e4, 40.0)])
def test_values_of_any_magnitude_in_float16(magnitude, tolerance):
    """Weights of values are scaled into float16's range: neither lost nor infinite."""
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split("int8", "int8", 32, 32, 2, torch.float16, capacities=(40,))
    codes = case.group.v
    for part in (codes.scale, codes.minimum):
        part.copy_((part.float() * magnitude).clamp(max=6e4).half())
    case.values = decode(Codes(*codes[:3]), "int8", 32)[:-1].double()
    parts, _ = case.run(decode_pieces)
    mine = parts.accumulated[1] / parts.total[1].unsqueeze(-1)
    torch.testing.assert_close(mine.double(), case.expected()[0][0], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("settings", "with_sinks", "padded"),
    [({}, False, False), ({"softcap": 5.0}, True, True), ({"window": 120}, False, True)],
)
def test_combine(settings, with_sinks, padded):
    from kvcompress.kernels.decode_combine.triton import decode_combine

    rows, dim, value_dim, held, batch = 3, 48, 80, 19, 2
    case = split("int8", "int8", dim, value_dim, rows, batch=batch, chunk=64, **settings)
    parts, _ = case.run(split_reference.decode_pieces)
    heads = len(case.heads.number)
    position = torch.arange(cases.NOW - held, cases.NOW, dtype=torch.int32).repeat(batch, 1)
    position[1, 4:] = -1
    exact = ExactView(
        random(batch, heads, held, dim, seed=8),
        random(batch, heads, held, value_dim, seed=9),
        position,
        None,
        4,
    )
    state = case.rows._replace(valid=torch.tensor([True, False]) if padded else None)
    sinks = random(heads * rows, seed=10) if with_sinks else None
    softmax = case.softmax._replace(sinks=sinks)
    views = (case.token, exact, case.heads, parts, state, softmax, case.reach)
    for mine, expected in zip(
        decode_combine(*views), reference.decode_combine(*views), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_combine_of_nothing_is_zero():
    from kvcompress.kernels.decode_combine.triton import decode_combine

    nothing = torch.full((1, 4), -1, dtype=torch.int32)
    dead = torch.full((1, 2), -torch.inf)
    combined = decode_combine(
        TokenView(
            *(random(1, h, 1, 16, seed=h) for h in (2, 1)), random(1, 1, 1, 16, seed=3), None
        ),
        ExactView(random(1, 1, 4, 16, seed=4), random(1, 1, 4, 16, seed=5), nothing, None, 0),
        HeadsView(torch.tensor([0]), KeyConstants(dead, dead), torch.tensor([[[0, 1]]])),
        PartsView(torch.zeros(1, 2, 16), dead, torch.zeros(1, 2)),
        RowsView(torch.tensor(5), nothing[0, :1], nothing[0, :1], None, torch.tensor([False])),
        Softmax(0.25, None, None),
        Reach(0, 0),
    )
    assert torch.equal(combined.out, torch.zeros(1, 1, 2, 16))
    assert (combined.lse == -torch.inf).all()
