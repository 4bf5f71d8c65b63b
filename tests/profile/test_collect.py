"""The collecting attention function: equal to eager attention, causal, small, gone afterwards."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.profile.collect import forward, held_out_rows, watching_rows
from kvcompress.recipe import Keep
from kvcompress.runtime.model.families import shape_of
from tests.profile.conftest import model_of


def collect(model, ids, scorer="raw"):
    layers = {}
    shape = shape_of(model.config, model.dtype)
    keep = Keep(scorer=scorer, score_rows=None)
    with watching_rows(model, shape, keep, lambda r: layers.__setitem__(r.layer, r)):
        forward(model, ids)
    return shape, layers


def eager_attention(model, ids):
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    return [layer[0] for layer in out.attentions]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("scorer", ["raw", "lift"])
def test_column_sums_equal_eager_attention(family, scorer, prompt):
    model = model_of(family)
    reference = eager_attention(model, prompt)
    shape, layers = collect(model, prompt, scorer)
    for number, rows in layers.items():
        n = rows.prompt_tokens
        attention = reference[number][:, :n, :n].double().unflatten(0, (shape.kv_heads, -1))
        weight = torch.arange(n) + 1.0 if scorer == "lift" else torch.ones(n)
        sums = (attention * weight.double()[:, None]).sum(2).mean(1)
        if scorer == "lift":
            sums = sums / (n - torch.arange(n))
        # float32 sums of about 236 rows against float64 ones
        torch.testing.assert_close(rows.ranks[0][:, :n].double(), sums, rtol=1e-5, atol=1e-5)
        assert (rows.ranks[0][:, n:] == -torch.inf).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox", "opt", "gpt2"])
def test_the_model_computes_what_it_did_before(family, prompt):
    model = model_of(family)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    shape = shape_of(model.config, model.dtype)
    with watching_rows(model, shape, Keep(), lambda rows: None), torch.no_grad():
        during = model(ids, use_cache=False).logits
    with torch.no_grad():
        after = model(ids, use_cache=False).logits
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)


def test_nothing_is_left_on_the_model(prompt):
    model = model_of("llama")
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    collect(model, prompt)
    with pytest.raises(ZeroDivisionError):
        with watching_rows(model, shape_of(model.config), Keep(), lambda rows: 1 / 0):
            forward(model, prompt)
    assert model.config._attn_implementation == "eager"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ranks_know_only_earlier_rows(prompt):
    model = model_of("llama")
    _, layers = collect(model, prompt, "lift")
    n = layers[0].prompt_tokens
    other = [*prompt[:n], *reversed(prompt[n:])]
    _, changed = collect(model, other, "lift")
    assert held_out_rows(len(prompt)) == len(prompt) - n
    for number, rows in layers.items():
        torch.testing.assert_close(changed[number].ranks[0], rows.ranks[0])
        assert not torch.equal(changed[number].ranks[-1], rows.ranks[-1])


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_attention_matrix_of_all_rows_ever_exists():
    model, length, heads = model_of("mistral"), 480, 4
    ids = torch.randint(3, 259, (length,)).tolist()
    shape = shape_of(model.config, model.dtype)
    with watching_rows(model, shape, Keep(), lambda rows: None), LargestTensor() as seen:
        forward(model, ids)
    assert seen.elements <= heads * 128 * length < heads * length * length


@pytest.mark.parametrize("length, rows", [(64, 32), (128, 64), (1024, 64), (1536, 96), (8192, 128)])
def test_held_out_rows(length, rows):
    assert held_out_rows(length) == rows
