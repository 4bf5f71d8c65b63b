"""What a prompt leaves to compiled kernels: the C ones, and the references in place of a GPU's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from kvcompress.kernels.compact_quantize import reference as compact
from kvcompress.kernels.cpu.library import library
from kvcompress.kernels.prefill_colsum import reference as colsum
from kvcompress.kernels.view import CodesView, KeyConstants, PromptView
from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.prompt import prompt_kernels, store_prompt
from kvcompress.runtime.store.segments import SegmentStore, StorageKind
from tests.kernels.cases import awkward, random, same_codes
from tests.runtime.battery import plan_for
from tests.runtime.models import build, prompts

HEADS = (
    HeadPlan(frequent=Budget(tokens=9)),  # int8
    HeadPlan(punct=True, special=True, frequent=Budget(tokens=6), k_dtype="model", v_dtype="int8"),
)
VOTERS = {
    "exact": {},
    "estimated": {"score_rows": 5, "score_stride": 4},
    "last": {"score_rows": 9},
}


@pytest.fixture
def calls(monkeypatch):
    """A CPU that passes for a GPU; which references were called."""
    found = []

    def stand_in(name, function):
        def call(*args):
            found.append(name)
            return function(*args)

        module = f"kvcompress.kernels.{name}.triton"
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: call}))

    stand_in("prefill_colsum", colsum.prefill_colsum)
    stand_in("compact_quantize", compact.compact_quantize)
    monkeypatch.setattr(prompt_kernels, "triton_runs", lambda device: True)
    monkeypatch.setattr(prompt_kernels, "library", lambda: None)
    return found


def states_of(family, keep, pads, tokens=60):
    """The layers' states after a prompt and two more tokens, and the logits."""
    model, inputs = build(family), prompts(2, tokens, pads)
    plan = plan_for(model, *HEADS, scorer="lift", **keep)
    attach(model, plan)
    cache = new_cache(model)
    with torch.no_grad():
        logits = [model(**inputs, **as_argument(cache), use_cache=True).logits]
        mask = inputs["attention_mask"]
        for _ in range(2):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            token = torch.full((2, 1), 7)
            made = model(input_ids=token, attention_mask=mask, **as_argument(cache))
            logits.append(made.logits)
    detach(model)
    return [layer.state for layer in cache.compressed_layers], torch.cat(logits, 1)


@pytest.mark.parametrize("score_queries", VOTERS)
@pytest.mark.parametrize("pads", [None, [7, 0]], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_kernels_leave_what_tensor_operations_leave(
    family, pads, score_queries, calls, monkeypatch
):
    got, logits = states_of(family, VOTERS[score_queries], pads)
    # no kernel tells the output of a softcap, and windows come as masks
    summed = pads is None and (family, score_queries) in {
        ("llama", "exact"), ("llama", "estimated"), ("gemma2", "estimated"),
    }  # fmt: skip
    assert ("prefill_colsum" in calls) is summed and "compact_quantize" in calls
    monkeypatch.setattr(prompt_kernels, "triton_runs", lambda device: False)
    calls.clear()
    expected, reference = states_of(family, VOTERS[score_queries], pads)
    assert not calls
    # a key of a later layer that another kernel's sums lead to may round to the next code
    torch.testing.assert_close(logits, reference, atol=2e-3, rtol=1e-3)
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for own, other in zip(mine.groups, theirs.groups, strict=True):
            assert torch.equal(own.store.position, other.store.position)
            for codes, known in (
                (own.store.keys, other.store.keys),
                (own.store.values, other.store.values),
            ):
                assert number or torch.equal(codes.data, known.data)
                assert (codes.data.float() - known.data.float()).abs().max() <= 1
            if other.store.score is not None:
                torch.testing.assert_close(own.store.score, other.store.score, rtol=1e-4, atol=1e-3)


def test_a_cpu_runs_no_kernels_of_a_gpu():
    assert not prompt_kernels.triton_runs(CPU)


CPU = torch.device("cpu")
STORAGES = [
    ("int8", "int8", 64, 64),
    ("int4", "int8", 48, 80),
    ("fp8", "int4", 32, 96),
    ("model", "fp8", 80, 64),
    ("int8", "model", 33, 47),
    ("rot4", "rot3", 80, 72),
    ("rot2", "rot4", 96, 64),
    ("rot3", "rot2", 128, 256),
]


@pytest.mark.skipif(library() is None, reason="the C kernels were not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "v", "dim", "value_dim"), STORAGES)
def test_c_encodes_kept_tokens_as_the_codec(k, v, dim, value_dim, dtype, threads):
    """To the last bit, from keys and values as a model lays them out, into slots in any order."""
    batch, heads, tokens, count = 2, 3, 150, 300
    key = awkward(batch, tokens, heads, dim, seed=1).to(dtype).transpose(1, 2)
    value = awkward(batch, heads, tokens, value_dim, seed=2).to(dtype)
    index = torch.arange(count) * 3
    kept = torch.stack([index // (heads * tokens), index // tokens % heads, index % tokens])
    slots = torch.randperm(count + 1, generator=torch.Generator().manual_seed(3))[:count]
    constants = random(heads, dim, seed=4), random(heads, dim, seed=5).abs() + 0.3
    stores = [
        SegmentStore(StorageKind(k, v, False), dim, value_dim, dtype, CPU, [[count + 1]])
        for _ in range(2)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert prompt_kernels.encode_kept(key, value, kept, slots, constants, stores[0])
    finally:
        torch.set_num_threads(before)
    codes = CodesView.of(stores[1].keys, k, dim), CodesView.of(stores[1].values, v, value_dim)
    compact.compact_quantize(PromptView(key, value, kept, slots), KeyConstants(*constants), *codes)
    same_codes(stores[0].keys, stores[1].keys)
    same_codes(stores[0].values, stores[1].values)


@pytest.mark.skipif(library() is None, reason="the C kernels were not built")
def test_a_prompt_is_encoded_in_c(monkeypatch):
    """And leaves what tensor operations leave."""
    got, logits = states_of("llama", {}, [7, 0])
    monkeypatch.setattr(store_prompt, "encode_kept", lambda *given: False)
    expected, reference = states_of("llama", {}, [7, 0])
    torch.testing.assert_close(logits, reference, atol=0, rtol=0)
    for mine, theirs in zip(got, expected, strict=True):
        for own, other in zip(mine.groups, theirs.groups, strict=True):
            same_codes(own.store.keys, other.store.keys)
            same_codes(own.store.values, other.store.values)
            assert torch.equal(own.store.position, other.store.position)
