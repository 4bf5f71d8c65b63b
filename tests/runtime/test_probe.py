"""What the probe says of models that are served, served with limits, and refused."""

from __future__ import annotations

import pytest

from kvcompress.runtime.check.probe import PROMPT, probe
from kvcompress.runtime.hf import generate
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.step import cpu
from kvcompress.runtime.store.state import LayerSettings
from tests.runtime.battery import FULL, plan_for
from tests.runtime.models import build, refused


def statuses(found) -> dict[str, str]:
    return {f.capability: f.status for f in found.findings}


@pytest.mark.parametrize(
    ("family", "layers", "limits"),
    [
        ("llama", "2 full", {}),
        ("gemma2", "1 sliding, 1 full", {}),
        ("gpt_oss", "1 sliding, 1 full", {"profile and planner": "no"}),
        ("opt", "2 full", {"relative positions (streams)": "no"}),
        # the model itself counts padding
        ("llama4", "2 chunked, 2 full", {"padded batches": "limit", "profile and planner": "no"}),
        ("gemma3n", "2 sliding, 2 full, 2 shared",
         {"drafts (assisted, lookup)": "limit", "relative positions (streams)": "no",
          "fixed arrays (compiled)": "no", "profile and planner": "no"}),
        ("deepseek_v3", "2 latent",
         {"drafts (assisted, lookup)": "limit", "relative positions (streams)": "no",
          "fixed arrays (compiled)": "no", "budgets": "limit", "tensor parallel": "no",
          "profile and planner": "no"}),
        ("qwen3_next", "2 linear, 2 full",
         {"drafts (assisted, lookup)": "no", "fixed arrays (compiled)": "no",
          "profile and planner": "no"}),
    ],
)  # fmt: skip
def test_what_each_kind_of_model_can_do(family, layers, limits):
    model = build(family)
    found = probe(model, family)
    assert found.supported
    assert found.layers == layers
    assert {k: v for k, v in statuses(found).items() if v != "yes"} == limits
    assert all(f.error <= 1e-5 for f in found.findings if f.error is not None)
    assert attached(model) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "bypasses transformers' attention interface"),
        ("jetmoe", "changes keys after it stored them"),
        ("diffllama", "changes values after it stored them"),
        ("t5", "encoder-decoder"),
    ],
)
def test_refusals_say_why(family, reason):
    found = probe(refused(family), family)
    assert not found.supported
    assert reason in found.refused
    assert found.findings == ()


def test_the_plan_that_was_attached_is_attached_again():
    model = build("llama")
    plan = plan_for(model, FULL)
    attach(model, plan)
    probe(model)
    assert attached(model) == (plan, None)


def test_a_wrong_cache_is_noticed(monkeypatch):
    """A stored token too few: the probe must not call that supported."""
    monkeypatch.setattr(
        LayerSettings, "sees", lambda self, query, key, start: key > query - (PROMPT - 1)
    )
    # the compiled step does not ask `sees`, so the tensor operations must be what is probed
    monkeypatch.setattr(cpu, "refusal", lambda *_: "refused by the test")
    found = probe(build("llama"))
    assert not found.supported
    assert "logits differ by" in found.refused


@pytest.mark.parametrize("family", ["llama", "gemma3n"])
@pytest.mark.parametrize(
    ("method", "capability"),
    [
        ("_get_candidate_generator", "drafts (assisted, lookup)"),
        ("_prefill", "cache"),
    ],
)
def test_the_probe_goes_the_way_that_users_go(family, method, capability, monkeypatch):
    """Forwards by hand are right here; generate is broken, as a new release may break it."""

    def broken(*args, **kwargs):
        raise AttributeError("of another release\nmore")

    monkeypatch.setitem(generate._OVERRIDES, method, broken)
    found = probe(build(family))
    if capability == "cache":
        assert found.refused == "generate fails: of another release"
        return
    told = {f.capability: f for f in found.findings}
    assert told[capability].status == "no"
    assert told[capability].note == "generate fails: of another release"
    assert told["cache"].status == told["prompts in parts"].status == "yes"


def test_other_tokens_from_generate_are_noticed(monkeypatch):
    """Forwards by hand are right here; generate feeds another prompt."""
    real = generate._OVERRIDES["_prefill"]

    def shifted(model, input_ids, generation_config, model_kwargs, *args, **kwargs):
        model_kwargs["position_ids"] = model_kwargs["position_ids"] + 1
        return real(model, input_ids.flip(1), generation_config, model_kwargs, *args, **kwargs)

    monkeypatch.setitem(generate._OVERRIDES, "_prefill", shifted)
    found = probe(build("llama"))
    assert "logits differ by" in found.refused
