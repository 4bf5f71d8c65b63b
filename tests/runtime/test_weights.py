"""A saved cache goes on with the weights that filled it, wherever they lie."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch

from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.weights import weights_digest
from kvcompress.runtime.saved.cachefile import CacheFileError
from tests.runtime.models import build
from tests.runtime.test_persist import plan_for, talk

OTHER = "made with other weights than the model has now, adapters included; load those"
# peft itself asks transformers for an attribute by its old name
quiet_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def with_plan(model):
    plan = plan_for(model, [HeadPlan(frequent=Budget(tokens=9))])
    attach(model, plan)
    return model


def saved(model, path):
    cache = new_cache(model)
    talk(model, cache, [0], 30, 1)
    cache.save(path)
    return cache


def lora(model, seed: int = 1, name: str = "default", strength: int = 8):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=strength, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    found = peft.get_peft_model(model, config, adapter_name=name).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.kvc"


def names(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("name", names(build("llama")))
@torch.no_grad()
def test_any_parameter_counts_and_any_number_of_it(name, path):
    model = with_plan(build("llama"))
    saved(model, path)
    parameter = model.get_parameter(name)
    for place in {0, parameter.numel() // 3, parameter.numel() - 1}:
        flat = parameter.view(-1)
        before = flat[place].clone()
        flat[place] += 1e-3
        with pytest.raises(CacheFileError, match=OTHER):
            CompressedCache.load(path, model)
        flat[place] = before
    CompressedCache.load(path, model)


@pytest.mark.parametrize("far", [1, 2, 31, 63])
@torch.no_grad()
def test_what_moves_within_a_parameter_counts(far):
    model = build("llama")
    before = weights_digest(model)
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight[[0, far]] = weight[[far, 0]]
    assert weights_digest(model) != before
    weight[[0, far]] = weight[[far, 0]]
    assert weights_digest(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wherever_the_only_other_number_stands_the_digest_is_another(dtype):
    """One value in a matrix of zeros, moved about: what sums and samples see worst."""
    found = set()
    for place in range(0, 40_000, 7):
        layer = torch.nn.Linear(200, 200, bias=False).requires_grad_(False).to(dtype)
        layer.weight.zero_().view(-1)[place] = 1.0
        found.add(weights_digest(layer))
    assert len(found) == len(range(0, 40_000, 7))


def test_a_copy_another_dtype_and_another_layout(path):
    model = build("llama")
    digest = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == digest
    assert weights_digest(build("llama")) == digest
    turned = copy.deepcopy(model)
    for parameter in turned.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    assert weights_digest(turned) == digest
    assert weights_digest(copy.deepcopy(model).bfloat16()) != digest


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the latter has biases
def test_layers_served_in_c_are_the_same_weights(family):
    from kvcompress.kernels.linear.bits16 import serve_16_bit

    model = build(family).bfloat16()
    digest = weights_digest(model)
    assert weights_digest(serve_16_bit(model)) == digest


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["demo", "qwen2"])
def test_quantized_weights_are_the_same_however_they_lie(bits, family, demo_model_dir, tmp_path):
    """bitsandbytes lays codes of 4 bits out anew for a CPU's first forward; C serves int8."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from kvcompress.kernels.linear.int8 import serve_bitsandbytes

    folder = demo_model_dir
    if family != "demo":
        # bitsandbytes fails at widths that its blocks of 64 do not fill, where it has AVX512-BF16
        build(family, intermediate_size=128).bfloat16().save_pretrained(tmp_path)
        folder = tmp_path
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    ).eval()
    digest = weights_digest(model)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    assert weights_digest(model) == digest
    if bits == 8:
        assert weights_digest(serve_bitsandbytes(model)) == digest
    held = [*model.parameters(), *model.buffers()]
    weight = next(t for t in held if t.dtype in (torch.uint8, torch.int8))
    assert weights_digest(model) == digest
    for change in (swapped(weight.view(-1)), swapped(scales(model, bits))):
        with change:
            assert weights_digest(model) != digest
    assert weights_digest(model) == digest


def scales(model, bits: int):
    """Of one layer, as they lie."""
    if bits == 8:
        return next(b for n, b in model.named_buffers() if n.endswith(".scale"))
    return weight_of_4_bits(model).quant_state.absmax.view(-1)


@contextlib.contextmanager
def swapped(flat):
    """Two of the numbers, in each other's place for a while."""
    other = int((flat != flat[0]).nonzero()[0])
    with torch.no_grad():
        pair = flat[[0, other]].clone()
        flat[[0, other]] = pair.flip(0)
        yield
        flat[[0, other]] = pair


def test_codes_that_a_processor_lays_out_anew_are_the_same_weights(demo_model_dir):
    """What bitsandbytes does in the first forward where there is AVX512-BF16."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for nested in (True, False):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
        )
        model = AutoModelForCausalLM.from_pretrained(
            demo_model_dir, quantization_config=config, dtype=torch.bfloat16
        )
        before = weights_digest(model)
        for weight in model.parameters():
            if hasattr(weight, "quant_state"):
                weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        assert weights_digest(model) == before
        with swapped(weight_of_4_bits(model).view(-1)):
            assert weights_digest(model) != before


def weight_of_4_bits(model):
    return next(p for p in model.parameters() if hasattr(p, "quant_state"))


@quiet_peft
def test_adapters_in_use_count_and_others_do_not(path):
    model = with_plan(build("llama"))
    bare = weights_digest(model)
    saved(model, path)
    wrapped = lora(model)
    with pytest.raises(CacheFileError, match=OTHER):
        CompressedCache.load(path, wrapped)
    with wrapped.disable_adapter():
        CompressedCache.load(path, wrapped)
        assert weights_digest(model) == bare
    saved(wrapped, path)
    CompressedCache.load(path, wrapped)
    with wrapped.disable_adapter(), pytest.raises(CacheFileError, match=OTHER):
        CompressedCache.load(path, wrapped)
    wrapped.merge_adapter()
    with pytest.raises(CacheFileError, match=OTHER):
        CompressedCache.load(path, wrapped)


@quiet_peft
def test_an_adapter_is_its_numbers_and_its_strength_and_not_its_name():
    digests = {
        name: weights_digest(lora(build("llama"), *given).base_model.model)
        for name, given in {
            "one": (1,),
            "other name": (1, "other"),
            "other numbers": (2,),
            "other strength": (1, "default", 16),
        }.items()
    }
    assert digests["one"] == digests["other name"]
    assert len(set(digests.values())) == 3


def test_a_cache_whose_model_is_gone_is_not_saved(path):
    model = with_plan(build("llama"))
    cache = new_cache(model)
    talk(model, cache, [0], 30)
    copied = copy.deepcopy(cache)
    copied.save(path)
    del model
    gc.collect()
    with pytest.raises(CacheFileError, match="the model that filled the cache is gone"):
        cache.save(path)
