"""Digests against naive loops, and the bound that makes ``minmax`` safe."""

from __future__ import annotations

import pytest
import torch

from kvcompress.evict.digest import VECTORS, best_blocks, digest_of, query_parts


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relevance(query: torch.Tensor, digest: torch.Tensor, kind) -> torch.Tensor:
    """``[..., R, E]`` of queries ``[..., R, D]`` and digests ``[..., E, vectors, D]``."""
    parts = enumerate(query_parts(query, kind))
    return sum(part @ digest[..., vector, :].mT for vector, part in parts)


@pytest.mark.parametrize("kind", VECTORS)
def test_relevance_is_what_its_definition_says(kind):
    keys, query = random(2, 3, 16, 8), random(2, 5, 8, seed=1)
    digest = digest_of(keys, kind)
    assert digest.shape == (2, 3, VECTORS[kind], 8)
    got = relevance(query, digest, kind)
    for b in range(2):
        for r in range(5):
            for e in range(3):
                block, q = keys[b, e].double(), query[b, r].double()
                if kind == "mean":
                    expected = float((q * block.mean(0)).sum())
                else:
                    best = [max(float(x * y) for y in block[:, d]) for d, x in enumerate(q)]
                    expected = sum(best)
                assert float(got[b, r, e]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_minmax_is_never_below_any_key_and_the_mean_is_their_mean():
    keys, query = random(50, 16, 32), random(7, 32, seed=1)
    products = torch.einsum("rd,etd->ret", query, keys)
    bound = relevance(query, digest_of(keys, "minmax"), "minmax")
    assert bool((bound >= products.amax(-1) - 1e-4).all())
    one = relevance(query, digest_of(keys[:, :1], "minmax"), "minmax")
    torch.testing.assert_close(one, products[..., 0], atol=1e-4, rtol=0)  # tight for one key
    mean = relevance(query, digest_of(keys, "mean"), "mean")
    torch.testing.assert_close(mean, products.mean(-1), atol=1e-4, rtol=0)


def test_the_best_blocks_of_each_row_and_never_an_empty_one():
    # [B=2, Hkv=1, G=2, n=2, E=4]
    score = torch.tensor(
        [
            [[[[1.0, 9, 0, 3], [0, 0, 5, 1]], [[2, 0, 0, 4], [7, 0, 0, 1]]]],
            [[[[1.0, 2, 9, 9], [3, 1, 9, 9]], [[0, 0, 9, 9], [0, 8, 9, 9]]]],
        ]
    )
    got = best_blocks(score, torch.tensor([4, 2]), 2)
    assert got.int().tolist() == [
        [[[0, 1, 0, 1], [1, 0, 1, 0]]],  # by the mean of the two heads' scores
        [[[1, 1, 0, 0], [1, 1, 0, 0]]],
    ]
    one = best_blocks(score, torch.tensor([4, 2]), 1)
    assert one.int().tolist() == [[[[0, 1, 0, 0], [1, 0, 0, 0]]], [[[0, 1, 0, 0], [0, 1, 0, 0]]]]
    everything = best_blocks(score, torch.tensor([4, 0]), 9)
    assert everything[0].all() and not everything[1].any()
