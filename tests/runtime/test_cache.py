"""What the cache is asked beside plain generation: prompts in parts, spans, turns, misuse."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch

from kvcompress import accounting
from kvcompress.errors import KVCompressError, PositionRangeWarning, UnsupportedModelError
from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.names import as_argument, cache_of
from kvcompress.runtime.store.state import LayerSettings, LayerState
from tests.runtime.battery import EXACT, FULL, PUNCT, plan_for
from tests.runtime.models import build, prompts, refused
from tests.runtime.test_parity import KEEP_SETS, greedy

FREQUENT = HeadPlan(frequent=Budget(tokens=9), local=Budget(tokens=8), **EXACT)


def llama(*heads: HeadPlan, **settings):
    model = build("llama")
    return attach(model, plan_for(model, *(heads or [FULL]), **settings))


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, **as_argument(cache)).logits


def kept_numbers(cache, row=0) -> list[set[int]]:
    """Per layer and KV head the tokens of a row that are kept, from its first real token."""
    found = []
    for layer in cache.compressed_layers:
        state = layer.state
        exact = state.exact_position[row][state.exact_position[row] >= 0]
        for group in state.groups:
            for index in range(len(group.heads)):
                start, size = group.store.starts[row][index], group.store.capacities[row][index]
                coded = group.store.position[start : start + size]
                kept = torch.cat([exact, coded[coded >= 0]]) - state.start[row]
                assert len(kept) == len(set(kept.tolist()))
                found.append(set(kept.tolist()))
    return found


# ---- prompts in parts
@pytest.mark.parametrize(("rows", "stride"), [(None, None), (12, None), (6, 5)])
@pytest.mark.parametrize("size", [1, 7, 59])
def test_a_held_prompt_equals_one_that_came_at_once(size, rows, stride):
    model = llama(*KEEP_SETS.values(), score_rows=rows, score_stride=stride)
    inputs = prompts(3, 60, [7, 1, 0])
    expected = greedy(model, inputs)
    cache = new_cache(model, compress="after_prefill")
    got = greedy(model, inputs, prefill_chunk_size=size, **as_argument(cache))
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert cache.nbytes() == cache_of(expected).nbytes()


def test_a_held_prompt_ends_at_the_first_decoded_token_or_when_told():
    model, ids = llama(FREQUENT), prompts(1, 40)["input_ids"]
    expected = new_cache(model)
    feed(model, expected, ids)
    logits = feed(model, expected, ids[:, :1])
    for told in (False, True):
        cache = new_cache(model, compress="after_prefill")
        feed(model, cache, ids[:, :25])
        feed(model, cache, ids[:, 25:])
        held = cache.nbytes()
        if told:
            cache.end_prefill()
            assert cache.nbytes() < held
        torch.testing.assert_close(feed(model, cache, ids[:, :1]), logits, atol=1e-5, rtol=0)
        assert cache.nbytes() < held
        assert kept_numbers(cache) == kept_numbers(expected)


def test_per_chunk_holds_less_than_the_prompt():
    model, ids = llama(FREQUENT), prompts(1, 90)["input_ids"]
    peaks = {}
    for compress in ("per_chunk", "after_prefill"):
        cache = new_cache(model, compress=compress)
        peaks[compress] = []
        for part in ids.split(10, 1):
            feed(model, cache, part)
            peaks[compress].append(cache.nbytes())
    assert max(peaks["per_chunk"]) == peaks["per_chunk"][-1] < peaks["after_prefill"][-1] / 2


# ---- protected spans, turns, caps
def test_protected_spans_outlive_any_generation():
    model = llama(HeadPlan(**EXACT), FREQUENT, HeadPlan(punct=True, **EXACT))
    cache = new_cache(model, protect=[(3, 9), range(20, 30)])
    out = greedy(
        model, prompts(2, 50, [5, 0]), **as_argument(cache), max_new_tokens=120, eos_token_id=None
    )
    assert out.sequences.shape[1] == 170
    for row in (0, 1):
        for kept in kept_numbers(cache, row):
            assert kept >= {*range(3, 9), *range(20, 30)}
    spans = [(range(3, 9), range(20, 30))] * 2
    plan = plan_for(model, HeadPlan(**EXACT), FREQUENT)
    attach(model, plan)
    cache = new_cache(model, protect=[(3, 9), (20, 30)])
    greedy(model, prompts(2, 50, [5, 0]), **as_argument(cache), max_new_tokens=40)
    lengths = [45, 50]
    now = [n + cache.get_seq_length() - 50 for n in lengths]
    assert cache.nbytes() == accounting.cache_bytes(plan, now, lengths, spans)


def test_every_row_may_protect_its_own_tokens():
    model = llama(HeadPlan(**EXACT))
    cache = new_cache(model, protect=[[(10, 14)], [], [(0, 20)]])
    feed(model, cache, **{"ids": prompts(3, 60)["input_ids"]})
    newest = set(range(55, 60))
    for row, own in enumerate([range(10, 14), range(0), range(20)]):
        for kept in kept_numbers(cache, row):
            assert kept == {0, 1, *own} | newest
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert kept_numbers(cache, 1)[0] == set(range(20)) | newest
    feed(model, cache, prompts(3, 90)["input_ids"][:, 60:])
    assert kept_numbers(cache, 2)[0] == {0, 1, *range(10, 14), *range(85, 90)}


@pytest.mark.parametrize(
    ("protect", "reason"),
    [
        ([(5, 5)], r"\(5, 5\) is not a range"),
        *(
            (spans, "is not a range of tokens")
            for spans in (
                [(-1, 4)],
                [(5, 10**12)],
                [(5, 1 << 31)],
                [5],
                [(1, 2, 3)],
                [(0.5, 3)],
                ["ab"],
                [None],
                [range(0, 9, 2)],
                [(9, 3)],
                [[(3, 9)], [(5, 10**12)]],
            )
        ),
        ([(0, 6), (4, 9)], r"\(0, 6\) and \(4, 9\) overlap"),
        ([[(0, 6)], [(4, 9)]], "rows, the batch has 1"),
    ],
)
def test_bad_spans_are_refused(protect, reason):
    model = llama()
    with pytest.raises(KVCompressError, match=reason):
        feed(model, new_cache(model, protect=protect), prompts(1, 12)["input_ids"])


def test_a_span_may_end_at_the_last_position_that_there_can_be():
    model, ids = llama(HeadPlan(**EXACT)), prompts(1, 40)["input_ids"]
    cache = new_cache(model, protect=[(5, (1 << 31) - 1)])
    feed(model, cache, ids)
    assert kept_numbers(cache, 0)[0] == {0, 1, *range(5, 40)}


def test_a_gap_before_the_end_of_a_span_is_refused():
    model, ids = llama(), prompts(2, 20)["input_ids"]
    cache = new_cache(model, protect=[(0, 15)])
    mask = torch.ones_like(ids)
    mask[0, 10:12] = 0
    with pytest.raises(KVCompressError, match="row 0: padding stands before the end"):
        feed(model, cache, ids, mask)


def test_every_turn_keeps_its_quota():
    """Turn 3 has the high scores of new tokens, turns 1 and 2 keep at least their quota."""
    lengths, head = [40, 30, 50], HeadPlan(local=Budget(tokens=29), **EXACT)
    kept = {}
    for quota in (0, 6):
        model = llama(head, turn_tokens=quota)
        cache = new_cache(model)
        start, turns = 0, []
        for length in lengths:
            feed(model, cache, prompts(1, 90)["input_ids"][:, :length])
            for _ in range(4):
                feed(model, cache, torch.tensor([[9]]))
            turns.append(range(start, start + length + 4))
            start += length + 4
        assert cache.compressed_layers[0].state.turn_starts == [0, 44, 78]
        kept[quota] = [
            [len(tokens & set(turn)) for turn in turns] for tokens in kept_numbers(cache)
        ]
    # 2 sinks, 5 recent, 24 coded: without a quota the newest 29, with it 6 of each turn at least
    assert kept[0] == [[2, 0, 29]] * 4
    assert kept[6] == [[8, 6, 17]] * 4


def test_a_cap_holds_for_any_length_and_punctuation_goes_first():
    head = HeadPlan(special=True, punct=True, local=Budget(tokens=11), cap=10, **EXACT)
    model = llama(head)
    cache = new_cache(model)
    feed(model, cache, prompts(1, 20)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    special, seen = [30, 31], list(prompts(1, 20)["input_ids"][0].tolist())
    for step in range(150):
        token = special[step % 2] if step in (20, 60) else int(
            torch.randint(min(PUNCT), max(PUNCT) + 12, (1,), generator=generator)
        )  # fmt: skip
        seen.append(token)
        feed(model, cache, torch.tensor([[token]]))
        for kept in kept_numbers(cache):
            assert len(kept) <= 2 + 5 + 10
    wanted = {n for n, token in enumerate(seen) if token in (30, 31, 32, 33)}
    local = set(range(len(seen) - 11, len(seen)))
    punct = [n for n, t in enumerate(seen) if t in PUNCT and n not in local and n >= 2]
    room = 10 - len(wanted - {0, 1}) - 6
    for kept in kept_numbers(cache):
        assert kept == {0, 1} | wanted | local | set(punct[-room:])


# ---- the position range
def test_one_warning_names_the_first_position_that_is_too_far():
    model = llama(FULL, max_position=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = greedy(model, prompts(2, 44, [6, 0]), max_new_tokens=20, eos_token_id=None)
    assert out.sequences.shape[1] == 64
    ours = [w for w in caught if issubclass(w.category, PositionRangeWarning)]
    assert len(ours) == 1
    assert "position 50 is beyond 49" in str(ours[0].message)
    assert "max_position 50" in str(ours[0].message)


# ---- several at once
def test_two_caches_in_two_threads():
    model = llama(*KEEP_SETS.values())
    inputs = [prompts(2, 50), prompts(2, 37, [9, 0])]
    expected = [greedy(model, i).sequences for i in inputs]
    got: list = [None, None]

    def work(number):
        got[number] = greedy(model, inputs[number]).sequences

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_two_caches_interleaved_step_by_step():
    model = llama(*KEEP_SETS.values())
    ids = [prompts(1, 40)["input_ids"], prompts(1, 60)["input_ids"][:, 20:]]
    alone = []
    for prompt in ids:
        cache = new_cache(model)
        alone.append([feed(model, cache, prompt)] + [
            feed(model, cache, torch.tensor([[t]])) for t in range(5, 25)
        ])  # fmt: skip
    caches = [new_cache(model), new_cache(model)]
    mixed = [[feed(model, c, p)] for c, p in zip(caches, ids, strict=True)]
    for token in range(5, 25):
        for number, cache in enumerate(caches):
            mixed[number].append(feed(model, cache, torch.tensor([[token]])))
    for ours, theirs in zip(mixed, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_reset_gives_an_empty_cache():
    model, inputs = llama(*KEEP_SETS.values()), prompts(2, 40)
    cache = new_cache(model)
    first = greedy(model, inputs, **as_argument(cache))
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    again = greedy(model, inputs, **as_argument(cache))
    assert torch.equal(first.sequences, again.sequences)


def test_a_hybrid_cache_can_be_reset_to_another_batch():
    model = build("qwen3_next")
    attach(model, plan_for(model, FREQUENT))
    cache = new_cache(model)
    greedy(model, prompts(3, 20), **as_argument(cache), max_new_tokens=4)
    cache.reset()
    got = greedy(model, prompts(1, 30), **as_argument(cache), max_new_tokens=8)
    expected = greedy(model, prompts(1, 30), **as_argument(new_cache(model)), max_new_tokens=8)
    assert torch.equal(got.sequences, expected.sequences)


def test_rows_can_be_repeated_and_selected():
    """What contrastive search asks of a cache."""
    model, inputs = llama(*KEEP_SETS.values()), prompts(2, 40)
    cache, token = new_cache(model), torch.tensor([[7], [8]])
    feed(model, cache, **{"ids": inputs["input_ids"]})
    expected = feed(model, copy.deepcopy(cache), token)
    cache.batch_repeat_interleave(3)
    wide = feed(model, copy.deepcopy(cache), token.repeat_interleave(3, 0))
    torch.testing.assert_close(wide, expected.repeat_interleave(3, 0), atol=1e-5, rtol=0)
    cache.batch_select_indices(torch.tensor([1, 4]))
    torch.testing.assert_close(feed(model, cache, token), expected, atol=1e-5, rtol=0)


def test_a_layer_lies_where_its_keys_are():
    """As with a model over several devices: nothing of a layer is made anywhere else."""
    model = build("llama")
    plan = plan_for(model, *KEEP_SETS.values(), HeadPlan(full=True))
    for layer, device in enumerate(["cpu", "meta"]):
        key = torch.zeros(2, 2, 5, 16, device=device)
        settings = LayerSettings(plan, None, layer)
        state = LayerState.empty(settings, key, key, [(), ()])
        for group in state.groups:
            group.store.relayout([[3] * len(group.heads)] * 2, [0, 1])
        assert {t.device.type for t in state.tensors()} == {device}
        assert {t.device.type for t in settings.key_constants(torch.device(device), 4096)} == {
            device
        }


def test_a_model_spread_by_accelerate(tmp_path):
    """Hooks move every layer's inputs, so that keys may lose the mark that `update` left."""
    from accelerate import dispatch_model

    plain = llama(*KEEP_SETS.values())
    expected = greedy(plain, prompts(2, 40, [3, 0]))
    model = build("llama")
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = dispatch_model(model, names, main_device="cpu", offload_dir=str(tmp_path))
    attach(model, plan_for(model, *KEEP_SETS.values()))
    got = greedy(model, prompts(2, 40, [3, 0]))
    assert torch.equal(got.sequences, expected.sequences)


# ---- misuse
def test_what_the_cache_cannot_do_is_refused():
    model, inputs = llama(), prompts(2, 20, [4, 0])
    with pytest.raises(KVCompressError, match="offloaded.*would go past the compressed cache"):
        greedy(model, inputs, cache_implementation="offloaded")
    with pytest.raises(KVCompressError, match="generate_batch uses its own paged cache"):
        model.generate_batch([[5, 6, 7]])
    with pytest.raises(KVCompressError, match="give per_chunk or after_prefill"):
        new_cache(model, compress="never")
    with pytest.raises(KVCompressError, match="LlamaForCausalLM has no plan: call kvcompress.att"):
        new_cache(build("llama"))
    with pytest.raises(KVCompressError, match="cannot be offloaded"):
        new_cache(model).layers[0].offload()
    cache = new_cache(model)
    with pytest.raises(KVCompressError, match="float32 cannot be combined"):
        feed(model, cache, inputs["input_ids"], torch.zeros(2, 1, 20, 20))


def test_a_mask_cannot_hide_tokens_that_are_stored():
    model, inputs = llama(), prompts(2, 20, [4, 0])
    cache = new_cache(model)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    mask = torch.ones(2, 25, dtype=torch.long)
    with pytest.raises(KVCompressError, match=r"shows \[20, 20\].*took in \[16, 20\]"):
        feed(model, cache, prompts(2, 5)["input_ids"], mask)
    mask[0, :4] = 0
    feed(model, cache, prompts(2, 5)["input_ids"], mask)
    assert cache.compressed_layers[0].state.row_seen == [21, 25]


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "gemma3n"])
def test_a_forward_outside_of_no_grad_works_and_refuses_a_gradient(family):
    model, ids = build(family), prompts(1, 30)["input_ids"]
    attach(model, plan_for(model, FREQUENT))
    caches = [new_cache(model), new_cache(model)]
    with torch.no_grad():
        expected = [model(input_ids=i, **as_argument(caches[0])).logits for i in ids.split(15, 1)]
    got = [model(input_ids=i, **as_argument(caches[1])).logits for i in ids.split(15, 1)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    held = [t for layer in caches[1].compressed_layers for t in layer.state.tensors()]
    assert not any(t.requires_grad for t in held)
    with pytest.raises(KVCompressError, match="train with use_cache=False"):
        got[1].sum().backward()


def test_generate_notices_another_text_or_no_new_token():
    model = llama(*KEEP_SETS.values())
    cache, inputs = new_cache(model), prompts(1, 40)
    first = greedy(model, inputs, **as_argument(cache), max_new_tokens=5).sequences
    with pytest.raises(KVCompressError, match="row 0: the first 44 ids are not the tokens"):
        greedy(model, {"input_ids": first.flip(1)}, **as_argument(cache))
    with pytest.raises(KVCompressError, match="seen all 44 tokens of this prompt already"):
        greedy(model, {"input_ids": first[:, :-1]}, **as_argument(cache))
    expected = greedy(model, {"input_ids": first}, **as_argument(copy.deepcopy(cache))).sequences
    only_new = {"input_ids": first[:, -1:], "attention_mask": torch.ones_like(first)}
    got = greedy(model, only_new, **as_argument(cache)).sequences
    assert torch.equal(got[:, 1:], expected[:, 45:])


def test_embeddings_show_no_token_classes():
    model = llama(KEEP_SETS["punct"])
    embeds = model.get_input_embeddings()(prompts(1, 20)["input_ids"])
    with pytest.warns(UserWarning, match="embeddings do not show"), torch.no_grad():
        model(inputs_embeds=embeds, **as_argument(new_cache(model)))


@pytest.mark.parametrize("family", ["jetmoe", "diffllama"])
def test_keys_that_change_after_they_were_stored_are_refused(family):
    model = refused(family)
    attach(model, plan_for(model, FULL))
    with pytest.raises(UnsupportedModelError, match="after it stored them|more than once"):
        greedy(model, prompts(1, 10))


def test_a_hybrid_model_needs_its_own_linear_layers():
    model = build("qwen3_next")
    with pytest.raises(KVCompressError, match="make the cache with kvcompress.new_cache"):
        CompressedCache(plan_for(model, FULL))
