"""Key constants: closed forms against sums, and what they buy on keys with large biases."""

import math

import pytest
import torch

from kvcompress.quant.codec import roundtrip
from kvcompress.quant.keystats import KeyStats, KVParams, Rotation, derive, mean_turn

THETA = 1e4


def rotation_of(dim, convention="half-split", theta=THETA):
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return Rotation(theta**-exponent, convention)


def test_mean_turn_is_the_mean_of_the_turns():
    freq = rotation_of(64).inv_freq
    positions = torch.arange(1000, dtype=torch.float64)
    angle = positions[:, None] * freq
    direct = torch.complex(angle.cos(), angle.sin()).mean(0)
    torch.testing.assert_close(mean_turn(freq, 1000), direct, rtol=0, atol=1e-12)
    still = mean_turn(torch.zeros(1), 50)
    torch.testing.assert_close(still, torch.ones(1, dtype=torch.complex128))


@pytest.mark.parametrize("convention", ["half-split", "interleaved"])
def test_turning_forth_and_back_is_exact_and_keeps_pair_norms(convention):
    rotation = rotation_of(32, convention)
    key = torch.randn(3, 7, 40, dtype=torch.float64)  # 8 channels are not rotated
    position = torch.tensor([0, 1, 5, 100, 1000, 10_000, 100_000])
    turned = rotation.turn(key, position)
    torch.testing.assert_close(rotation.turn(turned, position, sign=-1), key)
    assert torch.equal(turned[..., 32:], key[..., 32:])
    first, second = rotation.pairs()
    norms = key[..., first] ** 2 + key[..., second] ** 2
    torch.testing.assert_close(turned[..., first] ** 2 + turned[..., second] ** 2, norms)


def test_merged_moments_are_those_of_all_keys():
    key = torch.randn(2, 90, 8) + 1000
    parts = [KeyStats.of(part) for part in key.split([10, 50, 30], dim=1)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = KeyStats.of(key)
    assert merged.count == 90
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.var, whole.var, rtol=1e-8, atol=0)


@pytest.mark.parametrize("convention", ["half-split", "interleaved"])
def test_constants_are_the_moments_of_rotated_keys(convention):
    """Against keys rotated to every position of the declared range."""
    torch.manual_seed(0)
    rotation, positions = rotation_of(16, convention), 512
    mean, std = torch.randn(1, 16).double() * 5, torch.rand(1, 16).double() + 0.5
    params = derive([KeyStats(1, mean, std**2)], [rotation], positions)
    samples = mean[:, None] + std[:, None] * torch.randn(1, 40 * positions, 16).double()
    turned = rotation.turn(samples, torch.arange(positions).repeat(40))
    first, second = rotation.pairs()
    var = turned.var(1, correction=0)
    shared = ((var[:, first] + var[:, second]) / 2).sqrt()
    # a mean of 20,480 samples of standard deviation about 5
    torch.testing.assert_close(params.k_center[0].double(), turned.mean(1), rtol=0, atol=0.15)
    torch.testing.assert_close(params.k_scale[0][:, first].double(), shared, rtol=0.02, atol=0)
    assert torch.equal(params.k_scale[0][:, first], params.k_scale[0][:, second])


def test_without_rotation_the_constants_are_mean_and_deviation():
    key = torch.randn(2, 100, 8) * torch.arange(1, 9) + 3
    stats = KeyStats.of(key)
    params = derive([stats], [None], 64)
    torch.testing.assert_close(params.k_center[0], key.mean(1))
    torch.testing.assert_close(params.k_scale[0], key.std(1, correction=0))


def test_channels_that_never_move_keep_a_positive_scale():
    key = torch.randn(2, 50, 8)
    key[..., 3] = 7.0
    scale = derive([KeyStats.of(key)], [None], 64).k_scale[0]
    assert (scale > 0).all()
    assert float(scale[0, 3]) == pytest.approx(1e-4 * float(scale.median()), rel=1e-5)
    constant = derive([KeyStats.of(torch.ones(2, 50, 8))], [None], 64)
    assert torch.equal(constant.k_scale[0], torch.ones(2, 8))


def attention_error(query, key, value, stored):
    exact = (query @ key.mT).softmax(-1) @ value
    return float(((query @ stored.mT).softmax(-1) @ value - exact).norm() / exact.norm())


def sharpen(query, key, perplexity=32.0):
    """Scale `query` so that attention spreads over about `perplexity` tokens."""
    low, high = 1e-4, 10.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        attention = (middle * query @ key.mT).softmax(-1)
        entropy = -(attention * attention.clamp_min(1e-30).log()).sum(-1).mean()
        low, high = (middle, high) if entropy.exp() > perplexity else (low, middle)
    return low * query


@pytest.mark.parametrize("dim", [64, 128])
def test_biased_keys_survive_four_bits(dim):
    """Keys with a bias of 60 in slowly turning channels, as some families have; see the codec."""
    torch.manual_seed(0)
    rotation, tokens = rotation_of(dim), 1024
    bias = torch.zeros(dim, dtype=torch.float64)
    first, second = rotation.pairs()
    slow = dim // 32
    bias[first[-slow:]], bias[second[-slow:]] = 60.0, -20.0
    mixing = torch.randn(16, dim, dtype=torch.float64) / 4

    def keys(count):
        noise = 0.3 * torch.randn(1, count, dim, dtype=torch.float64)
        return bias + torch.randn(1, count, 16, dtype=torch.float64) @ mixing + noise

    params = derive([KeyStats.of(keys(4096))], [rotation], tokens)
    key = rotation.turn(keys(tokens), torch.arange(tokens)).float()
    query = sharpen(torch.randn(1, 64, dim), key - key.mean(1, keepdim=True))
    value = torch.randn(1, tokens, dim)
    center, scale = params.k_center[0][:, None], params.k_scale[0][:, None]

    def coded(dtype):
        return roundtrip((key - center) / scale, dtype) * scale + center

    plain = attention_error(query, key, value, roundtrip(key, "int4"))
    constant = attention_error(query, key, value, coded("int4"))
    assert constant < 0.25 < 1.0 < plain
    assert plain / constant > 6
    plain8 = attention_error(query, key, value, roundtrip(key, "int8"))
    constant8 = attention_error(query, key, value, coded("int8"))
    assert constant8 < 0.02 and plain8 / constant8 > 6


def test_params_survive_a_save(tmp_path):
    params = KVParams((torch.randn(2, 4), torch.randn(2, 4)), (torch.ones(2, 4), torch.ones(2, 4)))
    params.save(tmp_path / "kv.safetensors")
    loaded = KVParams.load(tmp_path / "kv.safetensors")
    for before, after in zip(params.k_center, loaded.k_center, strict=True):
        assert torch.equal(before, after)
    assert len(loaded.k_scale) == 2


def test_unusable_constants_are_refused(tmp_path):
    KVParams((torch.zeros(1, 2),), (torch.zeros(1, 2),)).save(tmp_path / "kv.safetensors")
    with pytest.raises(ValueError, match="layer 0.* constants that are not finite or positive"):
        KVParams.load(tmp_path / "kv.safetensors")
