"""Held-out rows that run again, against forwards of the whole prompt."""

import pytest
import torch

from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.profile.candidates import with_storage
from kvcompress.profile.collect import attend, collected, forward, held_out_rows
from kvcompress.profile.hf import attention_through
from kvcompress.profile.masks import KeepMasks
from kvcompress.profile.replay import (
    full_attention,
    mean_kl,
    planned_attention,
    replay,
)
from kvcompress.profile.tried import keep_of
from kvcompress.quant.codec import roundtrip
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import Keep
from kvcompress.runtime.model.families import shape_of
from tests.profile.conftest import model_of

FAMILIES = ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "opt"]
IDS = torch.randint(3, 259, (160,), generator=torch.Generator().manual_seed(7)).tolist()
ROWS = held_out_rows(len(IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_gives_what_the_whole_prompt_gives(family):
    model = model_of(family).eval()
    shape = shape_of(model.config, torch.float32)
    layers = collected(model, shape, Keep(), IDS)
    with torch.no_grad():
        again = replay(model, shape, IDS, layers, full_attention).log_softmax(-1)
        whole = model(torch.tensor([IDS]), use_cache=False).logits[0, -ROWS:].log_softmax(-1)
    torch.testing.assert_close(again, whole, rtol=0, atol=2e-4)  # float32 sums in another order


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("storage", [("model", "model"), ("int8", "int4")])
def test_a_plan_is_attention_masked_and_rounded(family, storage):
    """One forward of the whole prompt whose held-out rows see −inf masks and rounded tokens."""
    model = model_of(family).eval()
    shape = shape_of(model.config, torch.float32)
    layers = collected(model, shape, Keep(), IDS)
    none = torch.zeros(len(IDS), dtype=torch.bool)
    heads = [
        HeadPlan(frequent=Budget(ratio=0.2), local=Budget(ratio=0.1)),
        HeadPlan(full=True),
    ]
    row = tuple(with_storage(head, *storage) for head in heads)
    plan = uniform(shape, HeadPlan(full=True)).model_copy(
        update={"heads": (row,) * shape.layers, "scorer": "lift"}
    )
    keep = keep_of(plan)
    center = tuple(torch.randn(2, shape.head_dim) for _ in range(shape.layers))
    scale = tuple(torch.rand(2, shape.head_dim) + 0.5 for _ in range(shape.layers))
    params = KVParams(center, scale)

    def run(given):
        out = attend(given)
        layer, start = given.layer, len(IDS) - ROWS
        masks = KeepMasks(layers[layer], keep, none, none)
        for head, own in enumerate(row):
            c, s = center[layer][head], scale[layer][head]
            key = roundtrip((given.key[head] - c) / s, own.k_dtype) * s + c
            value = roundtrip(given.value[head], own.v_dtype)
            kept = masks.kept(own).expand(2, -1, -1)[head]
            for w in range(ROWS):
                exact = masks.exact[w][:, None]
                k = torch.where(exact, given.key[head], key)[kept[w]]
                v = torch.where(exact, given.value[head], value)[kept[w]]
                query = given.query[head, :, start + w]
                out[head, :, start + w] = (query @ k.T * given.softmax.scaling).softmax(-1) @ v
        return out

    with torch.no_grad():
        attention = planned_attention(plan, keep, params, none, none)
        found = replay(model, shape, IDS, layers, attention).log_softmax(-1)
        with attention_through(model, shape, run):
            oracle = model(torch.tensor([IDS]), use_cache=False).logits[0, -ROWS:].log_softmax(-1)
        full = replay(model, shape, IDS, layers, full_attention).log_softmax(-1)
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-3)
    assert float(mean_kl(full, found)) > 10 * float(mean_kl(oracle, found).abs())


def test_the_model_is_left_as_it_was():
    model = model_of("llama").eval()
    before = model.config._attn_implementation
    shape = shape_of(model.config, torch.float32)
    collected(model, shape, Keep(), IDS)
    forward(model, IDS)
    assert model.config._attn_implementation == before
