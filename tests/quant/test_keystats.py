"""Key constants: closed forms against sums, and what they buy on keys with large biases."""

import math

import pytest
import torch
from safetensors.torch import save_file

from kvcompress.plan import ModelShape
from kvcompress.quant.codec import roundtrip
from kvcompress.quant.keystats import (
    KeyStats,
    KVParams,
    Rotation,
    derive,
    mean_turn,
    positions_for,
)

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


SHAPE = ModelShape(
    model_type="m",
    config_hash="0",
    layers=2,
    query_heads=2,
    kv_heads=2,
    head_dim=4,
    sliding_windows=(None, None),
    max_position=64,
)


def test_params_survive_a_save(tmp_path):
    params = KVParams(
        (torch.randn(2, 4), torch.randn(2, 4)),
        (torch.ones(2, 4), torch.ones(2, 4)),
        {"surrogate": (torch.randn(2, 9), torch.randn(2, 9))},
    )
    params.save(tmp_path / "kv.safetensors")
    loaded = KVParams.load(tmp_path / "kv.safetensors", SHAPE)
    for before, after in zip(params.k_center, loaded.k_center, strict=True):
        assert torch.equal(before, after)
    assert len(loaded.k_scale) == 2
    assert torch.equal(loaded.tensors_of(1)["surrogate"], params.scorer["surrogate"][1])


@pytest.mark.parametrize("convention", ["half-split", "interleaved"])
def test_constants_of_fewer_positions_are_those_of_keys_at_these(convention, tmp_path):
    """Against the moments of keys that are turned to every one of these positions, in float64."""
    torch.manual_seed(0)
    dim, turned = 12, 8  # the last four channels do not turn
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.02, 0.0004]), convention)
    keys = torch.randn(2, 4000, dim, dtype=torch.float64) * torch.rand(dim) + torch.randn(dim) * 2
    params = derive([KeyStats.of(keys)] * 2, [rotation, None], 100_000)
    shape = SHAPE.model_copy(update={"head_dim": dim})
    params.save(tmp_path / "kv.safetensors")
    loaded = KVParams.load(tmp_path / "kv.safetensors", shape)
    mean = keys.mean(1, keepdim=True)
    for positions in (1, 50, 3000):
        center, scale = loaded.constants(0, positions)
        placed = rotation.turn(mean.expand(-1, positions, -1), torch.arange(positions))
        torch.testing.assert_close(center.double(), placed.mean(1), atol=1e-4, rtol=1e-4)
        own = keys.var(1, correction=0) + placed.var(1, correction=0)
        first, second = rotation.pairs()
        shared = (own[:, first] + own[:, second]) / 2
        torch.testing.assert_close(scale[:, first].double() ** 2, shared, atol=1e-4, rtol=1e-4)
        assert torch.equal(scale[:, first], scale[:, second])
        still = scale[:, turned:].double() ** 2
        torch.testing.assert_close(still, keys.var(1, correction=0)[:, turned:])
        whole, spread = loaded.constants(1, positions)
        torch.testing.assert_close(whole.double(), mean[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(spread.double() ** 2, keys.var(1, correction=0))
    for layer in (0, 1):
        for one, other in zip(
            loaded.constants(layer, 100_000),
            (params.k_center[layer], params.k_scale[layer]),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_files_without_moments_have_one_set_of_constants():
    params = KVParams((torch.zeros(2, 4),), (torch.ones(2, 4),))
    for positions in (1, 4096):
        assert params.constants(0, positions) == (params.k_center[0], params.k_scale[0])


def test_positions_leave_room_for_an_answer():
    assert [positions_for(tokens, 32768) for tokens in (0, 1, 3276, 3277, 6000, 30000)] == [
        *(4096, 4096, 4096, 4096, 8192, 32768)
    ]
    assert positions_for(100, 2048) == 2048
    assert positions_for(5000, 10_000) == 8192 and positions_for(8000, 10_000) == 10_000


def _tensors() -> dict[str, torch.Tensor]:
    kinds = {"k_center": 4, "k_scale": 4, "scorer.surrogate": 9}
    kinds |= dict.fromkeys(("k_mean", "k_partner", "k_spread", "k_frequency"), 4)
    return {f"layers.{i}.{k}": torch.ones(2, size) for i in range(2) for k, size in kinds.items()}


def _filled(value: float) -> torch.Tensor:
    one = torch.ones(2, 4)
    one[1, 3] = value
    return one


ODD_PARAMS = {
    "center missing": ({"layers.1.k_center": None}, "'layers.1.k_center' is missing"),
    "scorer missing": ({"layers.1.scorer.surrogate": None}, "surrogate' is missing"),
    "one more layer": ({"layers.2.k_scale": torch.ones(2, 4)}, "k_scale' is not one of its"),
    "one more tensor": ({"extra": torch.ones(1)}, "'extra' is not one of its tensors"),
    "scale empty": ({"layers.0.k_scale": torch.ones(0)}, r"k_scale has shape \(0,\)"),
    "scale wide": ({"layers.0.k_scale": torch.ones(2, 8)}, r"has shape \(2, 8\), the model has"),
    "center flat": ({"layers.1.k_center": torch.ones(8)}, r"has shape \(8,\), the model has"),
    "scorer heads": ({"layers.1.scorer.surrogate": torch.ones(3, 9)}, r"shape \(3, 9\), not 2 h"),
    "scorer flat": ({"layers.1.scorer.surrogate": torch.ones(2)}, r"shape \(2,\), not 2 heads"),
    "half": ({"layers.0.k_scale": torch.ones(2, 4).half()}, "k_scale is F16, not F32"),
    "whole": ({"layers.0.k_center": torch.ones(2, 4).int()}, "k_center is I32, not F32"),
    "center nan": ({"layers.0.k_center": _filled(math.nan)}, "k_center holds NaN"),
    "center inf": (
        {"layers.0.k_center": _filled(math.inf)},
        "k_center holds NaN, or values beyond",
    ),
    "center huge": ({"layers.0.k_center": _filled(1e30)}, "k_center holds NaN, or values beyond"),
    "scale nan": ({"layers.1.k_scale": _filled(math.nan)}, "k_scale has scales from nan to nan"),
    "scale inf": ({"layers.1.k_scale": _filled(math.inf)}, "k_scale has scales from 1 to inf"),
    "scale zero": ({"layers.1.k_scale": _filled(0.0)}, "k_scale has scales from 0 to 1"),
    "scale below": ({"layers.1.k_scale": _filled(-1.0)}, "k_scale has scales from -1 to 1"),
    "scale tiny": ({"layers.1.k_scale": _filled(1e-30)}, "k_scale has scales from 1e-30 to 1"),
    "scale huge": ({"layers.1.k_scale": _filled(1e30)}, r"k_scale has scales from 1 to 1e\+30"),
    "mean missing": ({"layers.1.k_mean": None}, "'layers.1.k_mean' is missing"),
    "spread missing": ({"layers.0.k_spread": None}, "'layers.0.k_spread' is missing"),
    "partner nan": ({"layers.1.k_partner": _filled(math.nan)}, "k_partner holds NaN"),
    "mean wide": ({"layers.0.k_mean": torch.ones(2, 8)}, r"has shape \(2, 8\), the model has"),
    "spread below": ({"layers.1.k_spread": _filled(-1.0)}, "k_spread has numbers from -1 to 1"),
    "spread nan": ({"layers.1.k_spread": _filled(math.nan)}, "k_spread has numbers from nan"),
    "turning back": ({"layers.0.k_frequency": _filled(-0.1)}, "k_frequency has numbers from -0.1"),
    "scorer nan": ({"layers.0.scorer.surrogate": torch.full((2, 9), math.nan)}, "surrogate holds"),
}


@pytest.mark.parametrize("odd", ODD_PARAMS)
def test_unusable_constants_are_refused(tmp_path, odd):
    changes, message = ODD_PARAMS[odd]
    tensors = {name: t for name, t in {**_tensors(), **changes}.items() if t is not None}
    save_file(tensors, tmp_path / "kv.safetensors")
    with pytest.raises(ValueError, match=message):
        KVParams.load(tmp_path / "kv.safetensors", SHAPE)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"[:9]):
        (tmp_path / "kv.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            KVParams.load(tmp_path / "kv.safetensors", SHAPE)
    with pytest.raises(ValueError, match="not a safetensors file"):
        KVParams.load(tmp_path / "none.safetensors", SHAPE)
