"""The system prompt's tokens, by the chat template."""

from __future__ import annotations

import pytest

from kvcompress.errors import KVCompressError
from kvcompress.runtime.model.chat import conversation_text, system_span

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
)


def test_the_span_ends_where_the_user_speaks(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    rule = {"role": "system", "content": "Answer in one word."}
    try:
        span = system_span(tiny_tokenizer, [rule, {"role": "user", "content": "Why?"}])
        ids = tiny_tokenizer.apply_chat_template([rule], tokenize=False)
    finally:
        tiny_tokenizer.chat_template = None
    text = "<s><system>Answer in one word.</s><user>"
    assert ids == "<s><system>Answer in one word.</s>"
    assert span == range(len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]))


def test_a_date_is_of_one_day_where_nobody_answers(tiny_tokenizer, monkeypatch):
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", dated)
    asked = [{"role": "user", "content": "Why?"}]
    assert conversation_text(tiny_tokenizer, asked) == "26 Jul 2024Why?"
    today = conversation_text(tiny_tokenizer, asked, to_answer=True)
    assert today.endswith("Why?") and "2024" not in today


def test_without_a_system_message_or_a_template_it_says_so(tiny_tokenizer):
    with pytest.raises(KVCompressError, match="no system message"):
        system_span(tiny_tokenizer, [{"role": "user", "content": "Why?"}])
    with pytest.raises(KVCompressError, match="no chat template"):
        system_span(tiny_tokenizer, [{"role": "system", "content": "Short."}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            r"no system message can be protected: .*System role not supported.* by hand",
        ),
        (TEMPLATE.replace("messages %}", "messages if m['role'] == 'user' %}"), "does not write"),
        ("{% if %}", "the chat template refuses the conversation"),
    ],
)
def test_a_template_without_a_system_role_says_so(tiny_tokenizer, template, message):
    tiny_tokenizer.chat_template = template
    try:
        with pytest.raises(KVCompressError, match=message):
            system_span(tiny_tokenizer, [{"role": "system", "content": "Short."}])
    finally:
        tiny_tokenizer.chat_template = None
