"""Built-in prompts for real models: exact lengths, answers in the text, hidden questions."""

import random
import re
import sys

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from kvcompress.errors import CalibrationError, CalibrationWarning
from kvcompress.profile.builtin import questions, real_text
from kvcompress.profile.builtin.prompts import ORDER, _plain, real_prompts
from kvcompress.profile.calibration import read_prompts
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.kinds import RECALL, Prompt, far_back_note
from kvcompress.recipe import Calibration

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>"
    "{% endfor %}"
)
TOKENS = 2048  # so that questions have 128 rows


@pytest.fixture(params=["plain", "chat", "plain without BOS", "chat without BOS"])
def tokenizer(request, demo_model_dir):
    """The demo model's, as that of a base or a chat model."""
    made = AutoTokenizer.from_pretrained(demo_model_dir)
    if "chat" in request.param:
        made.chat_template = CHAT
    if "without" in request.param:
        made.chat_template = made.chat_template and CHAT.removeprefix("{{ bos_token }}")
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B", special_tokens=[]
        )
    return made


def spoken(tokenizer, text):
    """(user, assistant) pairs of a conversation as it was written."""
    form = r"<\|user\|>(.*?)</s><\|assistant\|>(.*?)</s>"
    if not tokenizer.chat_template:
        form = r"User: (.*?)\nAssistant: (.*?)\n\n(?=User: |$)"
    return re.findall(form, text, re.DOTALL)


def test_answers_stand_far_above_and_most_questions_are_hidden(tokenizer):
    prompts = real_prompts(Calibration(prompts=16, tokens=TOKENS), tokenizer)
    assert [p.kind for p in prompts] == list(ORDER) * 2
    assert {len(p.ids) for p in prompts} == {TOKENS}
    bos = [p.ids.count(0) for p in prompts]
    assert set(bos) == {1 if tokenizer("a")["input_ids"][0] == 0 else 0}
    early = {kind: [] for kind in RECALL}
    rows = held_out_rows(TOKENS)
    for kind, text, before in (
        (p.kind, tokenizer.decode(p.ids), tokenizer.decode(p.ids[:-rows])) for p in prompts
    ):
        if kind == "text":
            continue
        if kind == "code" and not tokenizer.chat_template:
            asked = re.findall(r"^(assert \w+ ==|# \w+ is .*?: def \w+)(.*)$", text, re.MULTILINE)
            document = text[: text.index(asked[0][0])]
            early[kind].append(before.count(asked[0][0]))
            for question, answer in asked[:-1]:  # the last may be cut
                line = re.sub("assert (.*) ==", r"\1 =", question).split(": ")[-1]
                assert line + answer in document
            continue
        pairs = spoken(tokenizer, text + ("\n\n" if text.endswith("\n") else ""))
        asked = [pair for pair in pairs if not pair[1].startswith("I have read")]
        assert asked or kind == "quote"  # a passage may be longer than the rows
        document = before if not asked else text[: text.index(asked[0][0])]
        early[kind].append(sum(question in before for question, _ in asked))
        for question, answer in asked:
            if kind == "quote":
                assert answer.strip() in document
            elif kind == "code":
                assert answer.strip("`") in document
            else:
                key = re.search(r"the (\w+ \w+?)(?:,|\?| and)", question)[1]
                values = set(re.findall(r"\w+-\d{4}-\w+|\d{3,4}|[A-Z]\w+ [A-Z]\w+", answer))
                (line,) = [s for s in re.split(r"(?<=\.)\s", document) if f" {key}" in s]
                assert values <= set(re.findall(r"\w+-\d{4}-\w+|\d+|[A-Z]\w+ [A-Z]\w+", line))
    found = [count for counts in early.values() for count in counts]
    # in most prompts no question is complete before the rows
    assert sum(count == 0 for count in found) > len(found) / 2 and max(found) >= 1


@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_every_length_has_prompts_and_short_ones_are_text(tokenizer, tokens):
    prompts = real_prompts(Calibration(prompts=4, tokens=tokens), tokenizer)
    assert {len(p.ids) for p in prompts} == {tokens}
    kinds = {p.kind for p in prompts}
    if tokens == 64:
        assert kinds == {"text"}
    else:
        assert kinds == set(ORDER[:4])


def test_plain_text_begins_anew_after_its_end(tiny_tokenizer):
    def encode(text):
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = _plain(random.Random(0), "one\ntwo\nthree\n", 100, encode)
    assert len(ids) == 100
    assert tiny_tokenizer.decode(ids).strip("\n") in "one\ntwo\nthree\n" * 9


def test_prompts_follow_the_seed(tiny_tokenizer):
    def made(seed, data="builtin"):
        return read_prompts(
            Calibration(data=data, prompts=8, tokens=1500, seed=seed), tiny_tokenizer
        )

    assert made(1) == made(1)
    ids = [tuple(p.ids) for seed in (1, 2) for p in made(seed)]
    assert len(set(ids)) == len(ids)
    assert {p.kind for p in made(1, "recall")} == set(ORDER) - {"text"}


def test_texts_are_not_those_that_evaluation_reads(demo_model_dir):
    held_out = (demo_model_dir / "held_out.txt").read_text().splitlines()
    lines = {line.strip() for line in held_out if len(line.strip()) > 30}
    text = real_text.prose()
    assert len(text) > 100_000
    assert not lines & {line.strip() for line in text.splitlines()}
    assert "class ArgumentParser" in real_text.code()


def test_a_python_without_its_documentation_or_sources_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(real_text, "_source", lambda module: "")
    for read in (real_text.prose, real_text.code):
        read.cache_clear()
    try:
        with pytest.warns(CalibrationWarning, match="pydoc_data.* missing from this installation"):
            assert real_text.prose() == real_text.calibration_text()
        with pytest.warns(CalibrationWarning, match="sources of Python's standard library"):
            assert real_text.code() == real_text.prose()
    finally:
        for read in (real_text.prose, real_text.code):
            read.cache_clear()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", r"refuses .* \(no users here\); mend the templ"),
        ("{% for m in messages %}<{{ m['role'] }}>{% endfor %}", "leaves out what is said"),
    ],
)
def test_a_template_that_fails_is_one_line(tiny_tokenizer, monkeypatch, template, message):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(
        CalibrationError, match=f"built-in calibration: the chat template {message}"
    ):
        real_prompts(Calibration(prompts=1), tiny_tokenizer)


def test_signatures_are_of_functions_with_one_definition():
    source = (
        "def one(a, b=2):\n    pass\n\ndef two(a):\n\n    def twice(a, b):\n  def twice(c, d):\n"
    )
    (note,) = questions.signatures(random.Random(0), source, spoken=True)
    assert note.answer == "`def one(a, b=2):`" and "`one`" in note.question and not note.line


def test_the_note_on_what_looks_far_back():
    own, text, recall = Prompt([1], "own"), Prompt([1], "text"), Prompt([1], "chat")
    assert far_back_note([own, text, recall]) == ""
    assert "(2 of your own data, 1 of plain text)" in far_back_note([own, text, own])
    assert [p.recalls for p in (own, text, recall)] == [False, False, True]
