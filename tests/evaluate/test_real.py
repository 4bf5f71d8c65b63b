"""Workloads for real models: what is asked stands in the prompt, and scores against an oracle."""

import copy
import math
import random
import re
from functools import partial

import pytest
import torch

from kvcompress.accounting import kv_bytes
from kvcompress.checkpoint.compute import stored_dtype
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.quality import evaluate
from kvcompress.evaluate.real import REAL
from kvcompress.evaluate.serving import wider_bytes
from kvcompress.evaluate.session import Session, answer_logits
from kvcompress.evaluate.suite import make_suite
from kvcompress.evaluate.workloads import KNOWN, WORKLOADS, make_workloads
from kvcompress.evaluate.workloads_run import own_continuation, reference_logits, run_workload
from kvcompress.evaluate.workloads_table import compare_workloads, ranks, workload_table
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.model.families import shape_of
from kvcompress.tasks.facts import alike, asked, chain, constants, facts, pass_keys
from tests.evaluate.conftest import SecondReading

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKING = [name for name, workload in REAL.items() if workload.draw is not None]


class Copyist(SecondReading):
    """Goes on as the text did after the last place that ends like it, in the last `memory`
    characters."""

    def _next(self, ids):
        text = self.tokenizer.decode(ids, skip_special_tokens=True)[-self.memory :]
        for length in (40, 24, 12, 8):
            place = text.rfind(text[-length:], 0, len(text) - 1)
            if len(text) > length and place >= 0:
                return self.tokenizer.encode(text[place + length], add_special_tokens=False)[0]
        return self.tokenizer.encode("!", add_special_tokens=False)[0]


@pytest.fixture(scope="module")
def chatty(tiny_tokenizer):
    """The tiny tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def draw(tokenizer, *names, **settings):
    given = {"samples": settings.pop("samples", 8), "go_on": settings.pop("go_on", None)}
    sizes = Sizes(**{"context_tokens": 1800, "max_position": 4000, "windows": 0, **settings})
    return make_workloads(tokenizer, sizes, names=names, **given)


def shown(tokenizer, suite, sample):
    return tokenizer.decode(suite.documents[sample.document].prompt, skip_special_tokens=True)


# ---- texts
def test_notes_are_a_stem_and_its_answer_and_their_keys_differ():
    for make in (facts, alike, pass_keys, constants):
        notes = make(random.Random(1), 8)
        assert len(notes) == 8 and len({note.question for note in notes}) == 8
        for note in notes:
            assert note.question + note.answer in note.line
    assert asked("The secret word of the red fox is") == "What is the secret word of the red fox?"


def test_keys_of_a_multi_key_document_share_each_of_their_words():
    words = [re.findall(r"the (\w+) (\w+) is", n.question)[0] for n in alike(random.Random(0), 18)]
    for place in (0, 1):
        values = [pair[place] for pair in words]
        assert sum(values.count(value) > 1 for value in values) >= 16
    assert len(set(words)) == 18


def test_every_sum_of_a_chain_is_right_and_goes_on_from_the_one_before():
    for seed in range(20):
        before = None
        for text, answer in chain(random.Random(seed)):
            left, sign, right = re.fullmatch(r" (\d) ([+-]) (\d) =", text).groups()
            assert before in (None, left)
            assert int(answer) == int(left) + int(f"{sign}{right}")
            before = answer.strip()


# ---- documents and questions
@pytest.mark.parametrize("name", ASKING)
def test_documents_fit_and_hold_what_is_asked(chatty, name):
    (suite,) = draw(chatty, name)
    assert suite.fed and len(suite.samples) == 8
    for sample in suite.samples:
        (question,) = sample.questions
        text = shown(chatty, suite, sample)
        assert len(suite.documents[sample.document].prompt) <= suite.context_tokens
        if name not in ("arithmetic", "facts_visible"):
            ending = (question.text.replace("<assistant>", "\n").split("\n")[-1]).removeprefix(
                "It says: "
            )
            assert text.count(ending + question.answer) == 1


def test_a_visible_question_is_in_the_prompt_and_a_hidden_one_is_not(chatty):
    (hidden,), (visible,) = draw(chatty, "facts"), draw(chatty, "facts_visible")
    for sample in hidden.samples:
        stem = sample.questions[0].text.split("\n")[-1]
        assert shown(chatty, hidden, sample).count(stem) == 1  # the fact itself
    for sample in visible.samples:
        prompt, (question,) = shown(chatty, visible, sample), sample.questions
        stem = prompt.split("\n")[-1]
        assert question.text == " is" and prompt.count(stem) == 2
        assert f"{stem} is{question.answer}." in prompt


def test_the_next_turn_goes_through_the_chat_template_and_is_cut_at_the_question(
    chatty, tiny_tokenizer
):
    (suite,) = draw(chatty, "next_turn")
    sample = suite.samples[0]
    prompt, question = shown(chatty, suite, sample), sample.questions[0]
    assert prompt.startswith("<user>") and prompt.endswith("</assistant>\n<user>")
    stem = question.text.split("<assistant>")[1]
    assert question.text == f"{asked(stem)}</user>\n<assistant>{stem}"
    (plain,) = draw(tiny_tokenizer, "next_turn")
    assert "<user>" not in shown(tiny_tokenizer, plain, plain.samples[0])


# ---- scores
@pytest.mark.parametrize("name", ["facts", "multi_key", "passkey", "symbols"])
def test_one_who_copies_from_everything_is_right_and_one_who_sees_nothing_wrong(
    tiny_tokenizer, name
):
    (suite,) = draw(tiny_tokenizer, name, samples=4, context_tokens=900)
    vocabulary = len(tiny_tokenizer)
    sure, wrong = math.log(math.e + vocabulary - 1) - 1, math.log(math.e + vocabulary - 1)
    found = run_workload(Copyist(tiny_tokenizer, 10**6), tiny_tokenizer, suite)
    assert found.hits == (1.0,) * 4
    assert found.answer_nats == pytest.approx((sure,) * 4)
    blind = run_workload(Copyist(tiny_tokenizer, 1), tiny_tokenizer, suite)
    assert blind.hits == (0.0,) * 4
    assert blind.answer_nats == pytest.approx((wrong,) * 4)
    lengths = [len(sample.questions[0].answer) for sample in suite.samples]
    assert found.output_tokens == tuple(lengths)


def test_logits_of_padded_rows_are_those_of_one_row_alone(tiny_llama):
    prompt = [0, *range(10, 40)]
    rows = [[([50, 51], [60]), ([52], [61, 62])], [([], [70, 71])], [([53], [72])]]
    session = Session(tiny_llama, new_cache(), pad_id=2)
    logits = session.prefill([prompt])
    session.select([0] * 3)
    found = answer_logits(session, logits.expand(3, -1), rows)
    fed = [([50, 51, 60, 52, 61, 62], [2, 4, 5]), ([70, 71], [0, 1]), ([53, 72], [1])]
    for ours, (tokens, places) in zip(found, fed, strict=True):
        with torch.inference_mode():
            whole = tiny_llama(torch.tensor([prompt + tokens])).logits[0]
        expected = whole[[len(prompt) + place - 1 for place in places]]
        # the same sums in another order
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def new_cache():
    from transformers import DynamicCache

    return DynamicCache()


def test_text_alone_is_scored_by_windows(tiny_llama, chatty):
    go_on = partial(own_continuation, tiny_llama)
    names = ("own_text", "prose", "code", "chat")
    made = draw(chatty, *names, windows=2, context_tokens=100, continuation_tokens=8, go_on=go_on)
    assert "</user>\n<assistant>" in chatty.decode(made[3].windows.flatten())
    ids = made[0].windows
    with torch.inference_mode():
        likeliest = tiny_llama(ids).logits.argmax(-1)
    assert torch.equal(ids[:, 100:], likeliest[:, 99:-1])  # the model says it itself
    for suite in made:
        full = run_workload(tiny_llama, chatty, suite)
        assert full.hits == (1.0, 1.0) and full.kl_nats == (0.0, 0.0)
        logits = reference_logits(tiny_llama, chatty, suite)
        assert run_workload(tiny_llama, chatty, suite, reference=logits) == full
        assert full.answer_nats == pytest.approx([math.log(p) for p in full.perplexity])
        assert full.kv_ratio == 2.0  # float32 in the files, too
    plan = uniform(shape_of(tiny_llama.config), HeadPlan(local=Budget(tokens=8)), recent_tokens=4)
    found = run_workload(tiny_llama, chatty, made[1], plan)
    assert found.hits == tuple(1 - share for share in found.flips)
    assert min(found.kl_nats) > 0


def test_own_text_needs_the_model(tiny_tokenizer):
    with pytest.raises(ValueError, match="own_text: is about what the model itself says"):
        draw(tiny_tokenizer, "own_text", windows=1)
    (suite,) = draw(tiny_tokenizer, "prose")
    with pytest.raises(ValueError, match="prose: is about windows of text: ask for at least one"):
        run_workload(Copyist(tiny_tokenizer, 1), tiny_tokenizer, suite)


# ---- bytes of a model that runs in a wider dtype than its files have
def buffer_bytes(model):
    return sum(buffer.nbytes for buffer in {b.data_ptr(): b for b in model.buffers()}.values())


def test_bytes_are_those_of_the_files_dtype(tiny_llama, tiny_tokenizer, text_file):
    wide = copy.deepcopy(tiny_llama)
    wide.config.dtype = torch.bfloat16
    assert stored_dtype(wide) == torch.bfloat16 and stored_dtype(tiny_llama) == torch.float32
    head = HeadPlan(local=Budget(tokens=40))
    plan = uniform(shape_of(wide.config, torch.bfloat16), head, recent_tokens=8)
    sizes = {"windows": 1, "context_tokens": 100, "continuation_tokens": 4}
    (suite,) = draw(tiny_tokenizer, "prose", **sizes)
    assert run_workload(wide, tiny_tokenizer, suite).kv_ratio == 1.0
    found = run_workload(wide, tiny_tokenizer, suite, plan)
    assert found.kv_bytes == kv_bytes(plan, 100, 1)
    assert wider_bytes(tiny_llama, plan, 100) == 0
    asked = make_suite(tiny_tokenizer, tasks=[], **sizes, text=text_file)
    whole = evaluate(wide, tiny_tokenizer, None, None, asked)
    assert whole.kv_ratio == 1.0
    assert whole.weights_bytes == 2 * sum(p.numel() for p in wide.parameters()) + buffer_bytes(wide)
    planned = evaluate(wide, tiny_tokenizer, plan, None, asked)
    assert planned.kv_bytes == planned.kv_bytes_accounted == kv_bytes(plan, 100, 1)


# ---- what is ranked
def test_what_the_full_cache_fails_is_not_ranked(tiny_tokenizer, capsys):
    assert ranks("facts", 0.6) and not ranks("facts", 0.59) and ranks("facts", None)
    assert ranks("beyond", 0.0)  # there the full cache is itself lost
    suites = draw(tiny_tokenizer, "facts", context_tokens=900, samples=2)
    rows = list(compare_workloads(Copyist(tiny_tokenizer, 1), tiny_tokenizer, suites, []))
    from rich.console import Console

    Console(width=120).print(workload_table(rows))
    assert "R1 facts, not ranked: below 60% with the full cache" in capsys.readouterr().out


def test_names_of_real_workloads_are_their_own():
    assert not set(REAL) & set(WORKLOADS) and set(KNOWN) == {*REAL, *WORKLOADS}
    assert len({workload.axis for workload in KNOWN.values()}) == len(KNOWN)
