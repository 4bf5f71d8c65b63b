"""What the probe says of models that are served, served with limits, and refused."""

from __future__ import annotations

import pytest

from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.hf.attached import attached
from kvcompress.runtime.probe import PROMPT, probe
from kvcompress.runtime.state import LayerSettings
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
    monkeypatch.setattr("kvcompress.runtime.layer.library", lambda: None)
    found = probe(build("llama"))
    assert not found.supported
    assert "logits differ by" in found.refused
