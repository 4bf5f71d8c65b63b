"""`kvcompress chat` reads its turns from stdin, also where nobody types them."""

import copy
import io
import json

import pytest

import kvcompress
from kvcompress import HeadPlan, shape_of, uniform
from kvcompress.cli import app

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = "My name is Ada.\n\n  What?\r\nAgain!"


@pytest.fixture
def chat(tiny_llama, tiny_tokenizer, monkeypatch, capfd):
    model = copy.deepcopy(tiny_llama)
    kvcompress.attach(model, uniform(shape_of(model.config), HeadPlan(full=True)))
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr("kvcompress.bundle.load.load", lambda *_, **__: (model, tiny_tokenizer))

    def run(said, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            app.main(["chat", "b", "--max-new-tokens", "5", *options])
        assert end.value.code == 0
        return capfd.readouterr()

    return run


def test_each_line_is_a_turn(chat):
    replies = json.loads(chat(TALK, "--json").out)
    assert [reply["said"] for reply in replies] == ["My name is Ada.", "What?", "Again!"]
    assert not any(reply["read_again"] for reply in replies)
    shown = chat(TALK)
    for reply in replies:
        assert reply["completion"]["text"].strip() in shown.out
    assert shown.err.count("new ones; KV cache") == 3
    assert chat("\n", "--json").out == "[]\n" and chat("").out == ""


def test_a_system_message_comes_first(chat):
    plain, told = (json.loads(chat("Why?\n", "--json", *more).out)[0]["completion"]
                   for more in ((), ("--system", "Be brief.")))  # fmt: skip
    longer = len("<system>Be brief.") + 1  # bytes and the end token
    assert told["prompt_tokens"] == plain["prompt_tokens"] + longer
