"""KVzip against its definition, on the plain model, in float64; the surrogate is linear."""

import pytest
import torch

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import QueryRows, Tokens, newest, scorer
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.profile.repeat import score_context
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.families import shape_of
from tests.runtime.battery import EXACT
from tests.runtime.models import build, prompts
from tests.runtime.test_cache import feed, kept_numbers

LENGTH = 40
REQUEST = (9, 8)


def definition(name, context, request=REQUEST, family="llama", heads=2):
    """Per layer ``[Hkv, S]``, from the attentions of one plain forward; loops over query heads."""
    model = build(family)
    attention = [layer.self_attn for layer in model.model.layers]
    inputs, values = [], []
    for module in attention:
        module.register_forward_pre_hook(
            lambda m, a, kw: inputs.append(kw["hidden_states"][0].double()), with_kwargs=True
        )
        module.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0].double()))
    with torch.no_grad():
        text = torch.tensor([[*context, *request, *context]])
        weights = model(text, output_attentions=True, use_cache=False).attentions
    size = len(context)
    found = []
    for number, module in enumerate(attention):
        all_rows = weights[number][0, :, size:, :size].double()
        groups = len(all_rows) // heads
        norm = inputs[number][size:].norm(dim=-1)
        value = values[number][:size].unflatten(1, (heads, -1))
        width = value.shape[-1]
        score = torch.zeros(heads, size, dtype=torch.float64)
        gain = torch.zeros(heads, size, dtype=torch.float64)
        for query_head in range(len(all_rows)):
            head = query_head // groups
            paid = all_rows[query_head]
            if name == "kvzip_plus":
                paid = paid / norm[:, None]
            score[head] = torch.maximum(score[head], paid.amax(0))
            part = module.o_proj.weight.detach().double()[:, query_head * width :][:, :width]
            gain[head] = torch.maximum(gain[head], (value[:, head] @ part.T).norm(dim=-1))
        found.append(score * gain if name == "kvzip_plus" else score)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["kvzip", "kvzip_plus"])
def test_offline_scores_are_the_definition(name, family):
    model = build(family)
    context = prompts(1, LENGTH)["input_ids"][0].tolist()
    expected = definition(name, context, family=family)
    found = {}
    shape = shape_of(model.config, model.dtype)
    score_context(model, shape, context, REQUEST, name, lambda c: found.update({c.layer: c}))
    assert len(found) == len(expected)
    for layer, score in enumerate(expected):
        assert found[layer].seen.all()
        # float32 attention against float64 arithmetic on it
        torch.testing.assert_close(found[layer].score.double(), score, rtol=1e-4, atol=1e-7)


def test_tokens_outside_of_the_window_of_all_repeating_rows_are_marked():
    model = build("mistral")
    shape = shape_of(model.config, model.dtype)
    window = shape.sliding_windows[0]
    context = prompts(1, window + 20)["input_ids"][0].tolist()
    found = {}
    score_context(model, shape, context, (), "kvzip", lambda c: found.update({c.layer: c}))
    for layer in found.values():
        assert torch.equal(layer.seen, (layer.score > 0).all(0))
        assert layer.seen.sum() == window - 1


@pytest.mark.parametrize("name", ["kvzip", "kvzip_plus"])
def test_the_cache_keeps_what_the_definition_ranks_highest(name):
    model = build("llama")
    head = HeadPlan(frequent=Budget(tokens=9), **EXACT)
    plan = uniform(
        shape_of(model.config, model.dtype),
        head,
        scorer=name,
        sink_tokens=2,
        recent_tokens=3,
        repeat_ids=REQUEST,
        max_position=400,
    )
    attach(model, plan)
    ids = prompts(1, LENGTH)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    cache.finish_prompt(model)
    best = [row for layer in definition(name, ids[0].tolist()) for row in layer]
    for kept, score in zip(kept_numbers(cache), best, strict=True):
        wanted = (score[2:-3].topk(9).indices + 2).tolist()
        assert kept == {0, 1, *wanted, *range(LENGTH - 3, LENGTH)}
    # decoded tokens are newer than anything that the repetition voted on
    for step in range(20):
        feed(model, cache, torch.tensor([[30 + step]]))
    for kept in kept_numbers(cache):
        assert kept == {0, 1, *range(LENGTH + 20 - 12, LENGTH + 20)}


def test_votes_are_the_largest_attention_of_rows_that_may_vote():
    torch.manual_seed(0)
    probability = torch.rand(3, 2, 5, 7)
    weight = torch.ones(3, 5) / 2
    weight[:, 3] = 0.0
    norm = torch.rand(3, 5) + 0.5
    norm[:, 3] = 0.0  # a padded row's
    rows = QueryRows(weight, torch.arange(5).expand(3, 5), torch.arange(5), norm)
    allowed = [0, 1, 2, 4]
    plain = scorer("kvzip").collect(probability, rows)
    assert torch.equal(plain, probability[:, :, allowed].amax((1, 2)))
    plus = scorer("kvzip_plus").collect(probability, rows)
    paid = probability[:, :, allowed] / norm[:, None, allowed, None]
    torch.testing.assert_close(plus, paid.amax((1, 2)))
    fresh = newest(torch.tensor([4, 5]))
    merged = scorer("kvzip").merge(
        torch.cat([fresh, torch.tensor([0.5, 0.1])]), torch.tensor([0.2, 0.3, 0.4, 0.2])
    )
    torch.testing.assert_close(merged, torch.tensor([0.2, 0.3, 0.5, 0.2]))


def tokens(hidden, head, tensors):
    batch, length = hidden.shape[:2]
    key = torch.zeros(batch, len(head), length, 4)
    return Tokens(
        layer=1,
        head=torch.tensor(head),
        key=key,
        value=key,
        position=torch.arange(length),
        valid=torch.ones(batch, length, dtype=torch.bool),
        query=key[:, :, None, :0],
        scaling=1.0,
        hidden=hidden,
        tensors=tensors,
    )


def test_the_surrogate_is_linear_in_the_input_and_takes_the_heads_of_its_group():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, 8), torch.randn(3, 9)
    found = scorer("surrogate").arrive(tokens(hidden, [2, 0], {"surrogate": weight}))
    assert found.shape == (2, 2, 6)
    for place, head in enumerate([2, 0]):
        expected = (hidden.double() * weight[head, :8].double()).sum(-1) + weight[head, 8].double()
        torch.testing.assert_close(found[:, place].double(), expected, rtol=1e-5, atol=1e-5)
    # the same token by token, and nothing changes afterwards
    alone = scorer("surrogate").arrive(tokens(hidden[:, 3:4], [2, 0], {"surrogate": weight}))
    torch.testing.assert_close(alone, found[:, :, 3:4])
    assert torch.equal(scorer("surrogate").rank(found, torch.ones_like(found), 5), found)


def test_a_surrogate_without_weights_is_refused():
    with pytest.raises(PlanError, match="layer 1: the surrogate has no trained weights"):
        scorer("surrogate").arrive(tokens(torch.zeros(1, 2, 8), [0], {}))
