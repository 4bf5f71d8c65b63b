"""Weight formats per decoder layer: sizes, roundings, and their share of a memory target."""

import pytest
import torch

from kvcompress.accounting import kv_bytes, prefill_bytes
from kvcompress.errors import PlanError
from kvcompress.profile import weights
from kvcompress.profile.hf import decoder_layers
from kvcompress.profile.solve import solve
from kvcompress.profile.store import LayerWeights
from kvcompress.profile.weights import layer_modules, measure_weights, rounded, weight_sizes
from kvcompress.quant.weights import FORMATS
from kvcompress.recipe import BytesPolicy, Recipe
from tests.profile.conftest import model_of
from tests.profile.test_solve import PROFILE, SHAPE, profile_of


def layer(bf16, int8, nf4, int8_nats, nf4_nats):
    return LayerWeights(
        modules=("a",),
        size_bytes={"bf16": bf16, "int8": int8, "nf4": nf4},
        nats={"bf16": 0.0, "int8": int8_nats, "nf4": nf4_nats},
    )


LAYERS = (
    layer(400_000, 200_000, 100_000, 0.02, 500.0),
    layer(400_000, 200_000, 100_000, 0.01, 0.02),
)
SPLIT = PROFILE.model_copy(update={"weight_layers": LAYERS})
FIXED = prefill_bytes(SHAPE, 1024, 1)


def memory(total, **settings):
    return BytesPolicy(kind="bytes", memory=f"{total}B", **settings)


def whole(plan, profile=SPLIT):
    return profile.planned_weight_bytes(plan.weights) + FIXED + kv_bytes(plan, 1024, 1)


@pytest.mark.parametrize("total", range(1_000_000, 3_000_000, 250_000))
def test_memory_is_split_between_weights_and_cache(total):
    plan = solve(SPLIT, memory(total))
    assert len(plan.weights) == 2 and whole(plan) <= total
    uniform = []
    for scheme in ("bf16", "int8", "nf4"):
        try:
            uniform.append(solve(SPLIT, memory(total, weight_schemes=(scheme,))).predicted_loss)
        except PlanError:
            pass
    assert plan.predicted_loss <= min(uniform)


def test_the_needy_layer_keeps_its_bits():
    """The first layer loses 500 nats in nf4, the second next to nothing: bytes go to the first."""
    plan = solve(SPLIT, memory(900_000 + FIXED, weight_schemes=("bf16", "nf4")))
    assert plan.weights == ("bf16", "nf4")


def test_int8_and_nf4_are_never_mixed():
    for total in range(950_000, 2_500_000, 100_000):
        chosen = set(solve(SPLIT, memory(total)).weights) - {"bf16"}
        assert len(chosen) <= 1


def test_a_memory_that_nothing_fits_says_by_how_much():
    with pytest.raises(PlanError, match=r"bytes are (\d+) too few") as hit:
        solve(SPLIT, memory(300_000))
    needed = int(str(hit.value).split("needs ")[1].split()[0])
    assert whole(solve(SPLIT, memory(needed))) <= needed
    with pytest.raises(PlanError, match="bytes are 1 too few"):
        solve(SPLIT, memory(needed - 1))


def test_more_memory_never_predicts_worse():
    losses = [solve(SPLIT, memory(t)).predicted_loss for t in range(950_000, 2_500_000, 100_000)]
    assert losses == sorted(losses, reverse=True)


def test_a_format_that_is_asked_for_holds_for_all_layers():
    assert solve(SPLIT, memory(3_000_000), weights="nf4").weights == ()
    named = profile_of(Recipe(weights="int8")).model_copy(update={"weight_layers": LAYERS})
    assert solve(named, memory(3_000_000)).weights == ()
    assert solve(SPLIT, BytesPolicy(kind="bytes", keep_ratio=0.5)).weights == ()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_kl_of_a_layer_written_out(scheme):
    model = model_of("llama")
    prompts = [torch.randint(3, 259, (140,), generator=torch.Generator().manual_seed(5)).tolist()]
    found = measure_weights(model, 2, prompts)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = torch.tensor(prompts)
    with torch.no_grad():
        full = model(tokens).logits[0, -64:].double().log_softmax(-1)
        for name in found[1].modules:
            weight = model.get_submodule(name).weight
            weight.copy_(FORMATS[scheme].roundtrip(weight))
        other = model(tokens).logits[0, -64:].double().log_softmax(-1)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    expected = float((full.exp() * (full - other)).sum(-1).mean())
    assert found[1].nats[scheme] == pytest.approx(expected, rel=1e-3, abs=3e-6)
    assert len(found[0].modules) == 7 and all(".0." in name for name in found[0].modules)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_is_undone_and_sizes_are_those_of_the_format(family):
    model = model_of(family)
    modules = layer_modules(model, 2)[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with rounded(modules, "nf4"):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert changed and all(".0." in name for name in changed)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    sizes = weight_sizes(modules)
    biases = 2 * sum(m.bias.numel() for m in modules.values() if m.bias is not None)
    weights = sum(m.weight.numel() for m in modules.values())
    assert sizes["bf16"] == 2 * weights + biases
    assert weights < sizes["int8"] - biases < 1.1 * weights


def test_roundings_are_those_of_their_definition():
    weight = torch.tensor([[1.0, -0.5, 0.01] + [0.0] * 61, [0.2] * 64])
    int8 = FORMATS["int8"].roundtrip(weight)
    assert int8[0, :3].tolist() == pytest.approx([1.0, -64 / 127, 1 / 127])
    nf4 = FORMATS["nf4"].roundtrip(weight)
    assert nf4[0, :3].tolist() == pytest.approx([1.0, -0.5250730514526367, 0.0])
    assert nf4[1].tolist() == pytest.approx([0.2] * 64)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_layers_below_the_rounded_one_are_not_run_again(family):
    """Resumed from any layer, a model gives what it gives when it runs whole."""
    model = model_of(family).eval()
    ids = torch.randint(3, 259, (100,), generator=torch.Generator().manual_seed(6)).tolist()
    decoder = decoder_layers(model, 2)
    run = weights._Run(model, decoder, ids)
    assert run.resumes
    calls = []
    handles = [layer.register_forward_pre_hook(lambda m, a: calls.append(m)) for layer in decoder]
    with rounded(layer_modules(model, 2)[1], "nf4"):
        resumed = run.nats(1)
        run.resumes = False
        whole = run.nats(1)
    for handle in handles:
        handle.remove()
    assert resumed == pytest.approx(whole, rel=1e-4, abs=1e-7) and whole > 0
    assert not any("forward" in vars(layer) for layer in decoder)


def test_a_model_that_cannot_be_resumed_runs_whole(monkeypatch):
    """One that hands more from layer to layer than what the layers return."""
    model = model_of("llama").eval()
    decoder = decoder_layers(model, 2)
    seen = {}
    first, second = decoder

    def note(module, args, output):
        seen["noise"] = torch.randn_like(output)

    hook = first.register_forward_hook(note)
    other = second.register_forward_pre_hook(
        lambda module, args: (args[0] + seen.pop("noise", 9.0), *args[1:])
    )
    torch.manual_seed(0)
    run = weights._Run(model, decoder, list(range(3, 103)))
    hook.remove()
    other.remove()
    assert not run.resumes
