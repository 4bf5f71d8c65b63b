"""The reference kernels against float64 attention on the decoded vectors."""

from __future__ import annotations

import pytest
import torch

from kvcompress.kernels.decode_combine.reference import Combiner
from kvcompress.kernels.decode_split import reference
from kvcompress.kernels.decode_split.reference import decode_split
from kvcompress.quant.codec import Codes, decode, encode, value_groups
from kvcompress.storage import STORAGES

S, R, C, D = 3, 4, 50, 128


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(query, keys, values, visible, offset, softcap):
    logits = query.double() @ keys.double().mT + offset.double().unsqueeze(-1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values.double()


@pytest.mark.parametrize("k_dtype", STORAGES)
@pytest.mark.parametrize("v_dtype", STORAGES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_split_and_combine_equal_attention_on_decoded_vectors(
    k_dtype, v_dtype, softcap, monkeypatch
):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)  # many tiles of 64 slots and less
    query, offset = random(S, R, D) * 0.2, random(S, R, seed=1)
    keys = encode(random(S, 2 * C, D, seed=2), k_dtype)
    values = encode(random(S, 2 * C, D, seed=3) + 1, v_dtype, value_groups(v_dtype, D))
    visible = random(S, 1, 2 * C, seed=4) > -0.5
    expected = attention(
        query, decode(keys, k_dtype, D), decode(values, v_dtype, D), visible, offset, softcap
    )

    def part(codes, low, high):
        return Codes(
            *(
                None if t is None else t[:, low:high]
                for t in (codes.data, codes.scale, codes.minimum)
            )
        )

    combiner = Combiner(1, S, R, D, torch.device("cpu"))
    batch, head = torch.zeros(S, dtype=torch.int64), torch.arange(S)
    parts = []
    for low, high in ((0, 7), (7, 90), (90, 100)):
        parts.append(
            decode_split(
                query,
                offset,
                part(keys, low, high),
                part(values, low, high),
                k_dtype,
                v_dtype,
                visible[..., low:high],
                softcap,
            )  # fmt: skip
        )
        combiner.add(parts[-1], batch, head)
    # float32 sums of codes up to 255 with their minimum: a relative error of about 1e-6 · 255
    torch.testing.assert_close(combiner.output()[0].double(), expected, atol=3e-5, rtol=1e-4)
    weights = torch.cat([combiner.probabilities(p.logits, batch, head) for p in parts], -1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(S, R), atol=1e-5, rtol=0)
    assert (weights[~visible.expand_as(weights)] == 0).all()


def test_a_row_that_sees_nothing_gives_zero():
    codes = encode(random(1, C, D), "int8")
    part = decode_split(
        random(1, R, D), None, codes, codes, "int8", "int8", torch.zeros(1, 1, C, dtype=torch.bool)
    )
    combiner = Combiner(1, 1, R, D, torch.device("cpu"))
    combiner.add(part, torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(combiner.output(), torch.zeros(1, 1, R, D))
