"""Rules that decide for each row at the end of its prompt, and scorers that look at all of it."""

from __future__ import annotations

import pytest
import torch

from kvcompress import accounting
from kvcompress.errors import KVCompressError, PlanError
from kvcompress.evict.per_request import pooled_budgets, threshold_counts
from kvcompress.evict.scorers import Scorer
from kvcompress.evict.scorers.base import PromptScorer
from kvcompress.plan import (
    Budget,
    FastGenChoice,
    HeadPlan,
    PooledBudget,
    Threshold,
    uniform,
)
from kvcompress.quant.keystats import KVParams
from kvcompress.registry import SCORERS
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.cache.second_reading import LEAD_TOKENS
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import cache_of
from tests.runtime.battery import EXACT
from tests.runtime.models import build, prompts
from tests.runtime.test_cache import feed, kept_numbers

HEAD = HeadPlan(frequent=Budget(tokens=9), **EXACT)
CHAIN = HeadPlan(
    special=True,
    punct=True,
    frequent=Budget(ratio=0.2),
    local=Budget(ratio=0.2),
    **EXACT,
)
SETTINGS = {"sink_tokens": 2, "recent_tokens": 3}


def served(head=HEAD, **settings):
    model = build("llama")
    return attach(model, plan(model, head, **settings))


def plan(model, head=HEAD, **settings):
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, head, **{**SETTINGS, "special_ids": (0,), **settings})


def attention_of(ids, mask=None):
    """Per layer ``[B, Hq, T, T]`` of the plain model."""
    model = build("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions


def raw_sums(ids):
    """Per layer column sums ``[B, Hkv, T]``, the mean over the query heads of a group."""
    found = []
    for weights in attention_of(ids):
        grouped = weights.double().unflatten(1, (2, -1)).mean(2)
        found.append(grouped.sum(2))
    return found


def frequent_kept(cache, length):
    """Per layer and head, the kept tokens that are neither sinks nor recent."""
    return [{p for p in kept if 2 <= p < length - 3} for kept in kept_numbers(cache)]


def pool(sums, length):
    """Ranks of the tokens that compete."""
    free = sums.clone()
    free[..., :2] = free[..., length - 3 :] = -torch.inf
    return free


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_pooled_budgets_keep_the_best_tokens_of_all_heads(scope, floor):
    model = served(scorer="raw", per_request=PooledBudget(kind="pooled", scope=scope, floor=floor))
    ids = prompts(1, 40)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    cache.finish_prompt(model)
    ranks = [pool(s, 40) for s in raw_sums(ids)]
    heads = torch.cat(ranks, 1)
    if scope == "model":
        counts = pooled_budgets(heads, torch.full(heads.shape[:2], 9), floor)[0]
    else:
        nine = torch.full(ranks[0].shape[:2], 9)
        counts = [n for rank in ranks for n in pooled_budgets(rank, nine, floor)[0]]
    expected = [set(heads[0, h].topk(count).indices.tolist()) for h, count in enumerate(counts)]
    assert frequent_kept(cache, 40) == expected
    assert sum(counts) == 9 * heads.shape[1]
    assert len(set(counts)) > 1 and min(counts) >= 9 * floor


def test_pooled_over_the_model_in_inference_mode_can_be_changed_outside_of_it():
    rule = PooledBudget(kind="pooled", scope="model", floor=0.5)
    model = served(scorer="raw", per_request=rule)
    ids = prompts(1, 40)["input_ids"]
    cache = new_cache(model)
    with torch.inference_mode():
        feed(model, cache, ids[:, :39])
        cache.finish_prompt(model)
    before = kept_numbers(cache)
    feed(model, cache, ids[:, 39:])
    assert all(39 in kept for kept in kept_numbers(cache)) and before != kept_numbers(cache)


def test_pooled_bytes_are_those_of_the_accounting_and_survive_decoding():
    rule = PooledBudget(kind="pooled", scope="model", floor=0.1)
    model = served(scorer="lift", per_request=rule)
    inputs = prompts(3, 40, [6, 0, 1])
    out = model.generate(
        **inputs, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True
    )
    cache = cache_of(out)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert cache.nbytes() == accounting.cache_bytes(
        cache.plan, [n + 11 for n in lengths], lengths, chosen=cache.chosen_heads()
    )
    alone = model.generate(
        input_ids=inputs["input_ids"][:1, 6:],
        max_new_tokens=12,
        min_new_tokens=12,
        return_dict_in_generate=True,
    )
    assert torch.equal(alone.sequences[0, 34:], out.sequences[0, 40:])
    assert [h[0] for h in cache.chosen_heads()] == [h[0] for h in cache_of(alone).chosen_heads()]


def test_a_threshold_keeps_what_reaches_it_and_its_cap_holds_while_decoding():
    head = HeadPlan(frequent=Budget(tokens=12), **EXACT)
    model = served(head, scorer="raw", per_request=Threshold(kind="threshold", at_least=1.3))
    ids = prompts(1, 40)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    ranks = [pool(s, 40) for s in raw_sums(ids)]
    cap = torch.full(ranks[0].shape[:2], 12)
    counts = [n for rank in ranks for n in threshold_counts(rank, 1.3, cap)[0]]
    assert [len(kept) for kept in frequent_kept(cache, 40)] == [max(1, n) for n in counts]
    assert len(set(counts)) > 1
    before = cache.nbytes()
    for token in range(40):
        feed(model, cache, torch.tensor([[token % 90 + 3]]))
    slots = [c for layer in cache.compressed_layers for g in layer.state.groups
             for row in g.store.capacities for c in row]  # fmt: skip
    assert max(slots) <= 12 and cache.nbytes() >= before
    assert cache.nbytes() == accounting.cache_bytes(
        cache.plan, [80], [40], chosen=cache.chosen_heads()
    )


def test_a_draft_under_a_threshold_leaves_no_trace():
    head = HeadPlan(frequent=Budget(tokens=30), **EXACT)
    model = served(head, scorer="raw", per_request=Threshold(kind="threshold", at_least=0.4))
    inputs = prompts(1, 40)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    drafted = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert torch.equal(plain, drafted)


# ---- FastGen
def test_fastgen_per_request_chooses_as_attention_says_and_never_sees_other_rows():
    rule = FastGenChoice(kind="fastgen", recovery=0.55)
    model = served(CHAIN, scorer="raw", per_request=rule, punct_ids=(5, 6, 7))
    inputs = prompts(3, 60, [7, 0, 1])
    cache = new_cache(model)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.finish_prompt(model)
    together = cache.chosen_heads()
    labels = {head.label for layer in together for row in layer for head in row}
    assert len(labels) > 1
    for row, pad in enumerate([7, 0, 1]):
        alone = new_cache(model)
        feed(model, alone, inputs["input_ids"][row : row + 1, pad:])
        alone.finish_prompt(model)
        assert [layer[0] for layer in alone.chosen_heads()] == [layer[row] for layer in together]
        if row == 0:
            assert [len(k) for k in kept_numbers(alone)] == [len(k) for k in kept_numbers(cache)]


@pytest.mark.parametrize("reading", ["mass", "l1"])
def test_fastgen_recovers_what_was_asked_on_the_last_rows(reading):
    recovery = 0.6
    rule = FastGenChoice(kind="fastgen", recovery=recovery, reading=reading)
    model = served(CHAIN, scorer="raw", per_request=rule, punct_ids=(5, 6, 7))
    ids = prompts(1, 80)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    cache.finish_prompt(model)
    kept = kept_numbers(cache)
    least = recovery if reading == "mass" else 1 - (1 - recovery) / 2
    for layer, weights in enumerate(attention_of(ids)):
        for head in range(2):
            own = torch.tensor(sorted(kept[2 * layer + head]))
            mass = weights[0].unflatten(0, (2, -1))[head][:, -1, own].sum(-1)
            assert mass.min() >= least - 0.1  # the last row alone; the rule is on a low quantile


def test_a_higher_recovery_never_keeps_less():
    sizes = []
    for recovery in (0.3, 0.5, 0.7, 0.9, 0.99):
        rule = FastGenChoice(kind="fastgen", recovery=recovery)
        model = served(CHAIN, scorer="raw", per_request=rule, punct_ids=(5, 6, 7))
        cache = new_cache(model)
        feed(model, cache, prompts(1, 60)["input_ids"])
        cache.finish_prompt(model)
        sizes.append(cache.nbytes())
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_chosen_cache_can_be_saved_and_goes_on(tmp_path):
    rule = FastGenChoice(kind="fastgen", recovery=0.55)
    model = served(CHAIN, scorer="raw", per_request=rule, punct_ids=(5, 6, 7))
    inputs = prompts(2, 60, [4, 0])
    cache = new_cache(model)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.finish_prompt(model)
    cache.save(tmp_path / "cache")
    back = CompressedCache.load(tmp_path / "cache", model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    for step in range(6):
        token, seen = torch.tensor([[11 + step], [30 + step]]), mask[:, : 61 + step]
        assert torch.equal(feed(model, cache, token, seen), feed(model, back, token, seen))


# ---- reading the prompt again
class Echo(PromptScorer):
    """The largest attention that a repetition pays to a token."""

    needs = frozenset({"repeat"})

    def row_weight(self, row_index):
        return torch.ones_like(row_index, dtype=torch.float32)

    def initial(self, key, position, head):
        return torch.zeros_like(position, dtype=torch.float32)

    def collect(self, probability, rows):
        voting = (rows.weight > 0)[:, None, :, None]
        return (probability * voting).amax((1, 2))

    def merge(self, score, votes):
        return torch.maximum(score, votes)


ECHO = Echo("echo")


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setitem(SCORERS, "echo", f"{__name__}:ECHO")


@pytest.mark.parametrize("room", [400, 32])
def test_a_prompt_is_read_again_and_the_repetition_votes(echo, room):
    model = served(scorer="echo", repeat_ids=(9, 8), max_position=42 + LEAD_TOKENS + room)
    ids = prompts(1, 40)["input_ids"]
    cache = new_cache(model)
    feed(model, cache, ids)
    with pytest.raises(KVCompressError, match="call cache.finish_prompt"):
        feed(model, cache, ids[:, :1])
    cache = new_cache(model)
    feed(model, cache, ids)
    cache.finish_prompt(model)
    assert int(cache.get_seq_length()) == 40
    best = [torch.zeros(2, 40) for _ in range(2)]
    for low in range(0, 40, min(room, 40)):
        part = ids[:, max(0, low - LEAD_TOKENS) : low + room]
        text = torch.cat([ids, torch.tensor([[9, 8]]), part], 1)
        for layer, weights in enumerate(attention_of(text)):
            grouped = weights[0].unflatten(0, (2, -1))[:, :, 40:, :40]
            best[layer] = torch.maximum(best[layer], grouped.amax((1, 2)))
    for index, kept in enumerate(frequent_kept(cache, 40)):
        own = best[index // 2][index % 2].clone()
        own[:2] = own[37:] = -1
        assert kept == set(own.topk(9).indices.tolist())


def test_generate_reads_again_by_itself_and_padding_changes_nothing(echo):
    model = served(scorer="echo", repeat_ids=(9, 8))
    inputs = prompts(2, 40, [5, 0])
    both = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10)
    alone = model.generate(inputs["input_ids"][:1, 5:], max_new_tokens=10, min_new_tokens=10)
    assert torch.equal(both[0, 40:], alone[0, 35:])
    parts = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, prefill_chunk_size=16)
    assert torch.equal(parts, both)


# ---- scorers that see the module's input
class Linear(Scorer):
    """A number per token, linear in the input of the attention module."""

    uses_attention = False
    needs = frozenset({"hidden"})
    trained = ("weights",)

    def row_weight(self, row_index):
        return torch.zeros_like(row_index, dtype=torch.float32)

    def arrive(self, tokens):
        return torch.einsum("bti,hi->bht", tokens.hidden.float(), tokens.tensors["weights"])


LINEAR = Linear("linear")


def test_a_scorer_sees_the_input_of_the_attention_module(monkeypatch):
    monkeypatch.setitem(SCORERS, "linear", f"{__name__}:LINEAR")
    model = build("llama")
    trained = plan(model, scorer="linear")
    with pytest.raises(PlanError, match="was not trained for this model"):
        attach(model, trained)
        new_cache(model)
    detach(model)
    torch.manual_seed(1)
    weights = tuple(torch.randn(2, 64) for _ in range(2))
    zero = (torch.zeros(2, 16),) * 2
    attach(model, trained, KVParams(zero, (torch.ones(2, 16),) * 2, {"weights": weights}))
    ids = prompts(1, 40)["input_ids"]
    inputs = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"][0]),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    cache = new_cache(model)
    feed(model, cache, ids[:, :30])
    for at in range(30, 40):
        feed(model, cache, ids[:, at : at + 1])
    for hook in hooks:
        hook.remove()
    for index, kept in enumerate(frequent_kept(cache, 40)):
        hidden = torch.cat(inputs[index // 2 :: 2])
        score = hidden @ weights[index // 2][index % 2]
        alive = set(score[2:27].topk(9).indices.add(2).tolist())  # the prompt, then one by one
        for outgoing in range(27, 37):
            alive.add(outgoing)
            alive.discard(min(alive, key=lambda p: score[p]))
        assert kept == alive


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"raw", "mean", "lift", "surrogate"}))
def test_latent_layers_take_only_scorers_that_latents_can_serve(name):
    """A latent is no key and no value, so what a scorer does with those would be nonsense."""
    model = build("deepseek_v3")
    shape = shape_of(model.config, model.dtype)
    made = uniform(shape, HEAD, **SETTINGS, scorer=name, repeat_ids=(1,))
    if name in ("random", "key_norm"):
        CompressedCache(made, config=model.config)
        return
    with pytest.raises(KVCompressError, match=f"latent layers rank .* the plan by '{name}'"):
        CompressedCache(made, config=model.config)
