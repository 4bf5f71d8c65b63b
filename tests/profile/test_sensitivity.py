"""Sensitivities against finite differences, and against a forward of the whole prompt."""

import gc

import pytest
import torch

from kvcompress.profile.collect import attend, collected, held_out_rows
from kvcompress.profile.hf import attention_through
from kvcompress.profile.sensitivity import PATH, path_gradients, why_no_gradients
from kvcompress.recipe import Keep
from kvcompress.runtime.model.families import shape_of
from tests.profile.conftest import model_of

KEEP = Keep(sink_tokens=2, recent_tokens=5)


def whole_prompt(model, shape, ids, alpha, nudge=None):
    """(log-probabilities of the held-out rows, per layer full and bare outputs) in one forward."""
    rows, length = held_out_rows(len(ids)), len(ids)
    seen = []

    def run(given):
        softmax, value, window = given.softmax, given.value, given.softmax.window
        out = attend(given)
        now = torch.arange(length)[:, None]
        then = torch.arange(length)[None]
        kept = (then <= now) & ((then < (0 if window else 2)) | (then > now - 5))
        if window:
            kept &= then > now - window
        logits = softmax.logits(given.query, given.key).masked_fill(~kept, -torch.inf)
        bare = torch.einsum("hgts,hsd->hgtd", logits.softmax(-1), value)
        mixed = (1 - alpha) * out + alpha * bare
        if nudge is not None:
            mixed = mixed + nudge[given.layer]
        seen.append((out, bare))
        return torch.cat([out[:, :, :-rows], mixed[:, :, -rows:]], 2)

    with attention_through(model, shape, run), torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -rows:]
    return logits.double().log_softmax(-1), seen


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_gradients_are_what_small_changes_do(family):
    """A change of random direction in all layers, against KL differences in float64."""
    model = model_of(family).double()
    shape = shape_of(model.config, torch.float32)
    ids = torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    rows = held_out_rows(len(ids))
    found = path_gradients(model, shape, KEEP, ids, collected(model, shape, KEEP, ids))
    full, seen = whole_prompt(model, shape, ids, 0.0)

    generator = torch.Generator().manual_seed(3)
    change = []
    for out, _ in seen:
        step = torch.zeros_like(out)
        step[:, :, -rows:] = torch.randn(out[:, :, -rows:].shape, generator=generator)
        change.append(step)
    expected = 0.0
    for alpha, weight in PATH:
        values = []
        for sign in (-1, 1):
            nudge = [sign * 1e-3 * step for step in change]
            other, _ = whole_prompt(model, shape, ids, alpha, nudge)
            values.append(float((full.exp() * (full - other)).sum()))
        expected += (values[1] - values[0]) / 2e-3 * weight
    sizes = zip(found, change, strict=True)
    got = sum(float((u * step[:, :, -rows:]).sum()) for u, step in sizes)
    assert got == pytest.approx(expected, rel=0.02)  # float32 attention, finite differences


def test_sensitivities_add_up_to_the_whole_path(llama):
    """Integrated gradients: the change to bare heads everywhere costs the KL at the path's end."""
    shape = shape_of(llama.config, torch.float32)
    ids = torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    rows = held_out_rows(len(ids))
    found = path_gradients(llama, shape, KEEP, ids, collected(llama, shape, KEEP, ids))
    full, seen = whole_prompt(llama, shape, ids, 0.0)
    end, _ = whole_prompt(llama, shape, ids, 1.0)
    whole = float((full.exp() * (full - end)).sum()) / rows
    total = sum(
        float((u * (bare - out)[:, :, -rows:]).sum())
        for u, (out, bare) in zip(found, seen, strict=True)
    )
    # three points of the path, and bare outputs that move a little along it
    assert total / rows == pytest.approx(whole, rel=0.15)


def test_a_model_without_a_backward_pass_is_told_apart(llama, monkeypatch):
    shape = shape_of(llama.config, torch.float32)
    ids = list(range(3, 203))
    assert why_no_gradients(llama, shape, KEEP, ids) == ""

    class Stuck(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no derivative\nof this")

    head = llama.lm_head.forward
    monkeypatch.setattr(llama.lm_head, "forward", lambda x: Stuck.apply(head(x)))
    reason = why_no_gradients(llama, shape, KEEP, ids)
    assert reason == "the model's backward pass failed (no derivative)"


def test_no_graph_outlives_its_gradient(llama):
    """A graph that held itself would stay until the garbage collector comes: 60 MB a prompt."""
    shape = shape_of(llama.config, torch.float32)
    ids = list(range(3, 203))
    layers = collected(llama, shape, KEEP, ids)
    gc.collect()
    gc.disable()
    try:
        found = path_gradients(llama, shape, KEEP, ids, layers)
        left = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]
    finally:
        gc.enable()
    assert found and not left
