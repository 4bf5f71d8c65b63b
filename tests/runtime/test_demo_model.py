"""V1, V2, V4, V5 and V6 again on the shipped, trained model, in float32 and on real text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvcompress import accounting
from kvcompress.demo.run import MODEL
from kvcompress.plan import HeadPlan
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.names import cache_of
from tests.runtime import oracle
from tests.runtime.battery import FULL, plan_for
from tests.runtime.test_parity import KEEP_SETS, compressed_logits, greedy

PADS = [9, 0]
# float32 sums in another order; logits reach 20, so this is 1e-6 of them (seen: 1.4e-5)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def text():
    """``[2, 120]`` ids of held-out text, the first row after `PADS` pads."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held = (MODEL / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer(held[:4000], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids[:120], ids[200:320]])


def prompt_of(text, length=60):
    ids, mask = text[:, :length].clone(), torch.ones(2, length, dtype=torch.long)
    for row, pad in enumerate(PADS):
        ids[row, :pad], mask[row, :pad] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_v1(model, text):
    inputs = prompt_of(text)
    expected = greedy(model, inputs)
    attach(model, plan_for(model, FULL))
    got = greedy(model, inputs)
    detach(model)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_v2(model, text):
    inputs, tokens = prompt_of(text), text[:, 60:72]
    plan = plan_for(model, *KEEP_SETS.values())
    expected, dropped = oracle.run(model, plan, inputs, tokens)
    got = compressed_logits(model, plan, inputs, tokens)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert dropped > 0


def test_v4(model, text):
    config = type(model.config).from_dict({**model.config.to_dict(), "num_key_value_heads": 8})
    single = LlamaForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    state = model.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (4, 64)).repeat_interleave(2, 0).flatten(0, 1)
    single.load_state_dict(state)
    small = plan_for(model, KEEP_SETS["local"], HeadPlan(full=True, k_dtype="model"))
    wide = plan_for(single, FULL).model_copy(
        update={"heads": tuple(tuple(h for h in row for _ in range(2)) for row in small.heads)}
    )
    inputs, tokens = prompt_of(text), text[:, 60:80]
    got = compressed_logits(single, wide, inputs, tokens)
    expected = compressed_logits(model, small, inputs, tokens)
    # values in int8: another batch of heads may round a code the other way
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_v5(model, text):
    plan = plan_for(model, KEEP_SETS["frequent"], HeadPlan(full=True), HeadPlan(k_dtype="int4"))
    attach(model, plan)
    cache = cache_of(greedy(model, prompt_of(text)))
    detach(model)
    prompt = [60 - pad for pad in PADS]
    # a row that ends early is fed pads on: every row has the length of the longest
    assert cache.nbytes() == accounting.cache_bytes(
        plan, [n + cache.get_seq_length() - 60 for n in prompt], prompt
    )


def test_v6(model, text):
    plan = plan_for(model, *KEEP_SETS.values(), FULL)
    inputs, tokens = prompt_of(text), text[:, 60:80]
    together = compressed_logits(model, plan, inputs, tokens)
    for row, pad in enumerate(PADS):
        alone = {k: v[row : row + 1, pad:] for k, v in inputs.items()}
        single = compressed_logits(model, plan, alone, tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, atol=TOLERANCE, rtol=0)
