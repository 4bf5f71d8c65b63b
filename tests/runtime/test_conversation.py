"""Several turns on one cache, against a model that reads the whole text at every turn."""

from __future__ import annotations

import copy

import pytest
import torch

import kvcompress
from kvcompress import HeadPlan, shape_of, uniform
from kvcompress.errors import KVCompressError
from kvcompress.runtime.complete import complete
from kvcompress.runtime.conversation import Conversation

TURN = "<{{ m['role'] }}>{{ m['content'] }}</s>"
TO_ANSWER = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATE = "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + TO_ANSWER
# an answer is written otherwise than the model gave it
CHANGED = TEMPLATE.replace(TURN, TURN.replace("m['content']", "m['content'] | replace('', '.')"))
ASKED = ("My name is Ada.", "What?", "Again!")
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def model(tiny_llama):
    own = copy.deepcopy(tiny_llama)
    kvcompress.attach(own, uniform(shape_of(own.config), HeadPlan(full=True)))
    return own


@pytest.fixture
def tokenizer(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    return tiny_tokenizer


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(tiny_llama, ids):
    """What transformers' own cache gives after `ids`, read from their beginning."""
    inputs = torch.tensor([ids])
    output = tiny_llama.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_turns_on_one_cache_are_the_whole_text_read_by_a_full_cache(
    model, tiny_llama, tokenizer, system
):
    talk = Conversation(model, tokenizer, max_new_tokens=NEW_TOKENS, system=system)
    cache = talk.cache
    ids = encoded(tokenizer, "<s>" + (f"<system>{system}</s>" if system else ""))
    for number, asked in enumerate(ASKED):
        new = encoded(tokenizer, f"<user>{asked}</s><assistant>")
        ids = ids + new
        reply = talk.say(asked)
        expected = greedy(tiny_llama, ids)
        assert talk._answer == expected
        assert reply.completion.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.completion.prompt_tokens == len(ids) and not reply.read_again
        # of what was there, only the last token of the answer and the end of the turn
        assert number == 0 or reply.read_tokens <= len(new) + 2
        assert talk.cache is cache and cache.get_seq_length() == len(ids) + len(expected) - 1
        ids = [*ids, *expected, *([] if expected[-1] == 1 else [1])]
    roles = [message["role"] for message in talk.messages]
    assert roles == [*(["system"] if system else []), *["user", "assistant"] * len(ASKED)]


def test_a_turn_that_ends_otherwise_goes_on_without_its_last_token(
    model, tiny_llama, tokenizer, monkeypatch
):
    """The model ends its answer with a token that the template does not write."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("</s>", "|"))
    talk = Conversation(model, tokenizer, max_new_tokens=NEW_TOKENS)
    talk.say(ASKED[0])
    first, answer = list(talk._ids), talk._answer[:-1]
    talk._answer[-1] = 1
    talk.messages[-1]["content"] = tokenizer.decode(answer)
    reply = talk.say(ASKED[1])
    assert not reply.read_again
    ids = [*first, *answer, *encoded(tokenizer, f"|<user>{ASKED[1]}|<assistant>")]
    assert talk._ids == ids and talk._answer == greedy(tiny_llama, ids)


def test_a_template_that_rewrites_answers_has_all_of_it_read_again(
    model, tiny_llama, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", CHANGED)
    talk = Conversation(model, tokenizer, max_new_tokens=NEW_TOKENS)
    talk.say(ASKED[0])
    cache = talk.cache
    reply = talk.say(ASKED[1])
    assert reply.read_again and talk.cache is not cache
    written = tokenizer.apply_chat_template(
        talk.messages[:-1], tokenize=False, add_generation_prompt=True
    )
    ids = encoded(tokenizer, written)
    assert reply.read_tokens == len(ids)
    assert talk._answer == greedy(tiny_llama, ids)


def test_one_prompt_is_a_first_turn_unless_it_is_raw(model, tiny_llama, tokenizer, monkeypatch):
    written = encoded(tokenizer, "<s><user>Why?</s><assistant>")
    for raw, ids in ((False, written), (True, tokenizer("Why?")["input_ids"])):
        found = complete(model, tokenizer, "Why?", max_new_tokens=NEW_TOKENS, raw=raw)
        assert found.prompt_tokens == len(ids)
        assert found.text == tokenizer.decode(greedy(tiny_llama, ids), skip_special_tokens=True)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert complete(model, tokenizer, "Why?", max_new_tokens=NEW_TOKENS) == found


def test_without_a_template_there_is_no_conversation(model, tiny_tokenizer):
    with pytest.raises(KVCompressError, match="no chat template.*kvcompress generate goes on"):
        Conversation(model, tiny_tokenizer, max_new_tokens=1)
