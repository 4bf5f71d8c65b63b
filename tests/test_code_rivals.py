"""Formulas of other projects, on transformers' cache, against their definitions."""

import pytest
import torch
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32
)


@pytest.fixture
def rivals(benchmark):
    return benchmark("code_rivals")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_steps_are_off_by_half_a_step(rivals, bits):
    x, group = normal(1, 2, 70, 64) + 2, rivals.GROUP
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert ((rivals.per_token(bits)(x) - x).abs().amax(-1) <= 0.51 * step + 4e-3).all()
    parts = x.unflatten(-1, (-1, group))
    step = (parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)
    error = (rivals.in_groups(bits)(x) - x).unflatten(-1, (-1, group)).abs().amax(-1)
    assert (error <= 0.51 * step + 4e-3).all()
    whole = x[:, :, : 2 * group].unflatten(2, (-1, group))
    step = (whole.amax(3) - whole.amin(3)) / (2**bits - 1)
    coded = rivals.per_channel(bits)(x)
    error = (coded - x)[:, :, : 2 * group].unflatten(2, (-1, group)).abs().amax(3)
    assert (error <= 0.51 * step + 4e-3).all()
    assert torch.equal(coded[:, :, 2 * group :], x[:, :, 2 * group :])


def test_a_cache_reads_exactly_and_holds_what_is_left(rivals):
    for name, formula in rivals.FORMULAS.items():
        cache = formula.cache(CONFIG)
        key, value = normal(1, 2, 90, 32), normal(1, 2, 90, 32, seed=1)
        seen = cache.update(key, value, 0)
        assert torch.equal(seen[0], key) and torch.equal(seen[1], value)
        held = cache.layers[0]
        for now, before in ((held.keys, key), (held.values, value)):
            for part in (slice(0, rivals.SINKS), slice(-rivals.RECENT, None)):
                assert torch.equal(now[:, :, part], before[:, :, part])
            error = (now - before).square().sum() / before.square().sum()
            assert 0 < float(error) < (0.4 if name.endswith("2") else 0.1)
        more = normal(1, 2, 1, 32, seed=2)
        seen = cache.update(more, more, 0)
        assert torch.equal(seen[0][:, :, -1:], more)
        assert torch.equal(seen[0][:, :, :90], held.keys[:, :, :90])


def test_bits_of_a_number(rivals):
    found = {name: formula.bits(64) for name, formula in rivals.FORMULAS.items()}
    assert found["fp8 unscaled"] == 8 and found["int4 per token"] == 4.5
    assert found["TurboQuant 3"] == 3.25 and found["KIVI 2"] == 3.0
