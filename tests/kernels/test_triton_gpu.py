"""The Triton kernels on a CUDA device: the cases of the interpreter, and larger ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcompress.kernels.compact_quantize import reference as compact
from kvcompress.kernels.decode_combine import reference as combine
from kvcompress.kernels.prefill_colsum import reference as colsum
from kvcompress.kernels.tuning import refuses
from kvcompress.kernels.view import (
    ExactView,
    HeadsView,
    KeyConstants,
    PartsView,
    PromptView,
    Reach,
    RowsView,
    Softmax,
    TokenView,
    VotersView,
)
from kvcompress.quant.codec import value_groups
from tests.kernels.cases import (
    SHAPES,
    awkward,
    check_split,
    empty_codes,
    random,
    same_codes,
    split,
    to,
)
from tests.kernels.ends import CODES, broken, ends, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 5e-5  # float32 sums of codes up to 255 with their minimum
HALF = 4e-3  # the query and the weights of values are float16
COARSE = 4e-2  # keys and values of the model are bfloat16, and so are query and weights


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "v", "dim", "value_dim", "rows"), SHAPES)
def test_split(k, v, dim, value_dim, rows, dtype):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split(k, v, dim, value_dim, rows, dtype, batch=2, device="cuda")
    bound = HALF if dtype == torch.float16 or "model" not in (k, v) else COARSE
    check_split(decode_pieces, case, TOLERANCE if dtype == torch.float32 else bound)


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("storage", ["model", "int8", "int4", "fp8"])
def test_split_at_every_width(storage, dim):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    assert refuses(storage, storage, dim, dim) is None
    for rows in (1, 3, 8):
        case = split(storage, storage, dim, dim, rows, torch.bfloat16, device="cuda")
        check_split(decode_pieces, case, COARSE if storage == "model" else HALF)


@pytest.mark.parametrize(
    "settings",
    [
        {"softcap": 5.0},
        {"window": 120},
        {"block": 64, "batch": 2},
        {"chunk": 1024, "capacities": (280, 1, 65)},
    ],
    ids=str,
)
def test_what_a_query_may_see(settings):
    from kvcompress.kernels.decode_split.triton import decode_pieces

    case = split("int8", "int4", 64, 64, 3, torch.float16, device="cuda", **settings)
    check_split(decode_pieces, case, HALF)


def test_addresses_beyond_two_to_the_31():
    """Slots whose rows begin past 2**31 elements."""
    from kvcompress.kernels.decode_split.triton import decode_pieces

    dim, far = 256, 2**23 + 70  # rows of 256 bytes: 2**31 bytes and some
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    near = split("int8", "int8", dim, dim, 4, torch.float16, capacities=(70,), device="cuda")
    expected, near_logits = near.run(decode_pieces)

    def moved(t):
        if t is None:
            return None
        fill = -1 if t.dtype == torch.int32 else 0
        there = torch.full((far + 71, *t.shape[1:]), fill, dtype=t.dtype, device="cuda")
        there[far : far + 71] = t
        return there

    def codes(c):
        return c._replace(data=moved(c.data), scale=moved(c.scale), minimum=moved(c.minimum))

    group, pieces = near.group, near.pieces
    group = group._replace(k=codes(group.k), v=codes(group.v), position=moved(group.position))
    pieces = pieces._replace(work=pieces.work + torch.tensor([far, 0, 0, 0], device="cuda"))
    parts, _ = near.outputs()
    logits = torch.full((near.queries, far + 70), torch.nan, device="cuda")
    views = (near.token, near.heads, group, pieces, near.rows, near.softmax, near.reach)
    decode_pieces(*views, parts, logits)
    for mine, theirs in zip(parts, expected, strict=True):
        assert torch.equal(mine.cpu()[1:-1], theirs[1:-1])
    seen = near.visible
    assert torch.equal(logits[:, far:].cpu()[:, seen], near_logits[:, seen])


@pytest.mark.parametrize("pieces", [1, 40])
def test_combine(pieces):
    from kvcompress.kernels.decode_combine.triton import decode_combine

    batch, heads, rows, dim, held = 2, 3, 4, 128, 20
    position = torch.arange(held, dtype=torch.int32).repeat(batch, 1)
    start = torch.zeros(batch, dtype=torch.int32)
    first = torch.arange(batch * heads).view(batch, heads) * pieces
    chunks = torch.stack([first, torch.full_like(first, pieces)], -1)
    constants = KeyConstants(*(random(heads, dim, seed=s) for s in (10, 11)))
    views = (
        TokenView(
            random(batch, heads * rows, 1, dim, seed=1),
            random(batch, heads, 1, dim, seed=2),
            random(batch, heads, 1, dim, seed=3),
            None,
        ),
        ExactView(*(random(batch, heads, held, dim, seed=s) for s in (4, 5)), position, None, 4),
        HeadsView(torch.tensor([2, 0, 1]), constants, chunks),
        PartsView(
            random(batch * heads * pieces, rows, dim, seed=6),
            random(batch * heads * pieces, rows, seed=7),
            random(batch * heads * pieces, rows, seed=8).abs() + 0.1,
        ),
        RowsView(torch.tensor(held + 1), start, start, None, torch.tensor([True, False])),
        Softmax(dim**-0.5, None, random(heads * rows, seed=9)),
        Reach(0, 0),
    )
    expected = combine.decode_combine(*views)
    moved = (to(view, "cuda") for view in views)
    for mine, theirs in zip(decode_combine(*moved), expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["model", "int8", "int4", "fp8"])
def test_codes_are_those_of_the_codec_to_the_last_bit(storage, dtype):
    """Of the codec on the CPU: torch divides by a constant through its reciprocal on a device."""
    from kvcompress.kernels.compact_quantize.triton import compact_quantize

    batch, heads, tokens, dim, count = 2, 3, 200, 128, 1000
    key = awkward(batch, heads, tokens, dim, seed=1).to(dtype)
    value = awkward(batch, heads, tokens, dim, seed=2).to(dtype)
    index = torch.randperm(batch * heads * tokens, generator=torch.Generator().manual_seed(3))
    index = index[:count]
    kept = torch.stack([index // (heads * tokens), index // tokens % heads, index % tokens])
    slots = torch.randperm(count + 1, generator=torch.Generator().manual_seed(4))[:count]
    constants = random(heads, dim, seed=5), random(heads, dim, seed=6).abs() + 0.3
    results = []
    for kernel, device in ((compact_quantize, "cuda"), (compact.compact_quantize, "cpu")):
        keys = empty_codes(storage, count + 1, dim, 1, dtype)
        values = empty_codes(storage, count + 1, dim, value_groups(storage, dim), dtype)
        keys, values = to(keys, device), to(values, device)
        prompt, own = PromptView(key, value, kept, slots), KeyConstants(*constants)
        kernel(to(prompt, device), to(own, device), keys, values)
        results.append((keys, values))
    for ours, theirs in zip(*results, strict=True):
        same_codes(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_column_sums(dtype, tolerance):
    from kvcompress.kernels.prefill_colsum.triton import prefill_colsum

    batch, heads, rows, tokens, chosen, dim = 2, 2, 4, 700, 130, 128
    query = random(batch, heads * rows, chosen, dim, seed=1).to(dtype)
    key = random(batch, heads, tokens, dim, seed=2).to(dtype)
    position = torch.arange(tokens - chosen, tokens)
    weight, first = random(batch, chosen, seed=3).abs(), torch.tensor([0, 40])
    logits = query.double().unflatten(1, (heads, rows)) @ key.double().unsqueeze(2).mT * dim**-0.5
    keys = torch.arange(tokens)
    visible = (keys <= position[:, None]) & (keys >= first[:, None, None])
    lse = logits.masked_fill(~visible[:, None, None], -torch.inf).logsumexp(-1)
    lse = lse.flatten(1, 2).float()
    views = VotersView(query, key, lse, position, weight, first), Softmax(dim**-0.5), Reach(0, 0)
    expected = colsum.prefill_colsum(*views)
    got = prefill_colsum(*(to(view, "cuda") for view in views))
    torch.testing.assert_close(got.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", CODES)
def test_ends_of_every_dtype(code, dtype):
    from kvcompress.kernels.compact_quantize.triton import compact_quantize

    rows = torch.cat([ends(dtype, 128), broken(dtype, 128)]).cuda()
    key, value = rows[None, None], rows.flip(0)[None, None].contiguous()
    count = len(rows)
    kept = torch.stack([torch.zeros(count), torch.zeros(count), torch.arange(count)]).long().cuda()
    constants = torch.full((1, 128), 0.25).cuda(), torch.full((1, 128), 0.5).cuda()
    results = []
    for kernel in (compact_quantize, compact.compact_quantize):
        keys = to(empty_codes(code, count, 128, 1, dtype), "cuda")
        values = to(empty_codes(code, count, 128, value_groups(code, 128), dtype), "cuda")
        kernel(PromptView(key, value, kept, kept[2]), KeyConstants(*constants), keys, values)
        results.append((keys, values))
    for ours, theirs in zip(*results, strict=True):
        same_bits(ours, theirs)
