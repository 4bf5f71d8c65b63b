"""Every kind of input file: its text, or one line that says where it is wrong and what to do."""

import json

import pytest

from kvcompress.errors import CalibrationError
from kvcompress.profile.texts import texts
from kvcompress.recipe import Calibration

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
TALK = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
    for role, content in TALK
]
PARTS = [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TALK]
WRITTEN = "<s><system>Be brief.\n<user>Why?\n<assistant>So.\n"
FOLDED = "<s><user>Be brief.\n\nWhy?\n<assistant>So.\n"


def rows(*values, end="\n"):
    return "".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode()


@pytest.fixture
def read(tmp_path, tiny_tokenizer):
    def read_(name, content, template=None, **settings):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        tiny_tokenizer.chat_template = template
        try:
            return list(texts(Calibration(data=str(path), **settings), tiny_tokenizer))
        finally:
            tiny_tokenizer.chat_template = None

    return read_


def odd(separator):
    return {"text": f"one{separator}two"}


GOOD = {
    "plain": ("a.jsonl", rows({"text": "one"}, {"text": "two"}), ["one", "two"]),
    "byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + rows({"text": "one"}), ["one"]),
    "byte-order mark, text": ("a.txt", b"\xef\xbb\xbfone\ntwo", ["one\n", "two"]),
    "CRLF": ("a.jsonl", rows({"text": "one"}, {"text": "two"}, end="\r\n"), ["one", "two"]),
    "CRLF, text": ("a.txt", b"one\r\ntwo\r\n", ["one\n", "two\n"]),
    "empty lines": ("a.jsonl", b"\n\n" + rows({"text": "one"}) + b" \n\r\n", ["one"]),
    "no last line end": ("a.jsonl", rows({"text": "one"}, end=""), ["one"]),
    "a pair of surrogates": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    "a name in capitals": ("a.JSONL", rows({"text": "one"}), ["one"]),
    "a huge line": ("a.jsonl", rows({"text": "x" * 3_000_000}), ["x" * 3_000_000]),
    **{
        f"U+{ord(c):04X} in a string": ("a.jsonl", rows(odd(c)), [f"one{c}two"])
        for c in "\u2028\u2029\x85\x1c\x0b\x0c"
        if c >= " "
    },
    **{
        f"U+{ord(c):04X} in a text": ("a.txt", f"one{c}two".encode(), [f"one{c}two"])
        for c in "\u2028\u2029\x85\x1c\x0b\x0c\r"
    },
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_files(read, kind):
    name, content, expected = GOOD[kind]
    assert read(name, content) == expected


CHATS = {
    "messages": ("messages", MESSAGES),
    "ShareGPT": ("conversations", SHAREGPT),
    "roles under conversations": ("conversations", MESSAGES),
    "content in parts": ("messages", PARTS),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", CHATS)
def test_conversations_are_written_by_the_chat_template(read, tmp_path, kind, suffix):
    column, value = CHATS[kind]
    content = rows({"id": 1, column: value})
    if suffix == ".parquet":
        content = parquet(tmp_path, {"id": [1], column: [value]})
    assert read(f"a{suffix}", content, TEMPLATE) == [WRITTEN]
    assert read(f"a{suffix}", content, TEMPLATE, text_column=column) == [WRITTEN]
    assert read(f"a{suffix}", content, NO_SYSTEM + TEMPLATE) == [FOLDED]


def parquet(tmp_path, columns):
    import pyarrow
    from pyarrow.parquet import write_table

    path = tmp_path / "made.parquet"
    write_table(pyarrow.table(columns), path)
    return path.read_bytes()


LATIN = "one caf\xe9".encode("latin-1")
BAD = {
    "Latin-1": ("a.txt", b"one\n" + LATIN, "line 2: byte 0xe9 is not UTF-8"),
    "Latin-1 JSON": ("a.jsonl", b'{"text": "' + LATIN + b'"}', "line 1: byte 0xe9 is not UTF-8"),
    "UTF-16": ("a.txt", "one".encode("utf-16"), "line 1 holds a NUL byte; it must be UTF-8"),
    "NUL": ("a.txt", b"one\ntw\0o", "line 2 holds a NUL byte"),
    "NUL in JSON": ("a.jsonl", b'{"text": "\0"}', "line 1 holds a NUL byte"),
    "broken JSON": ("a.jsonl", rows({"text": "a"}) + b'{"text"', "line 2 is not JSON"),
    "a list": ("a.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
    "a string": ("a.jsonl", b'"text"\n', "line 1 is not a JSON object"),
    "null": ("a.jsonl", rows({"text": "a"}, {"text": None}), "line 2: text holds null"),
    "a number": ("a.jsonl", rows({"text": 1}), "line 1: text holds int"),
    "a column that ends": ("a.jsonl", rows({"text": "a"}, {"x": 1}), "line 2 has no 'text'"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud83d"}', r"line 1 holds \\ud83d, half of a surr"),
    "deep brackets": ("a.jsonl", b"[" * 100_000, "line 1 is JSON that cannot be read"),
    "a number too long": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is JSON that cannot"),
    "packed": ("a.jsonl.gz", b"\x1f\x8b", r"ends in .txt, .jsonl, .parquet, unpacked"),
    "another kind": ("a.csv", b"", "ends in .txt, .jsonl, .parquet$"),
    "no parquet": ("a.parquet", b"PAR1 no PAR1", "not a readable parquet file"),
    "an empty parquet": ("a.parquet", b"", "not a readable parquet file"),
    "missing": ("a.jsonl", None, "no such file"),
    "no template": ("a.jsonl", rows({"messages": MESSAGES}), "messages: the tokenizer has no chat"),
    "prompt and completion": (
        "a.jsonl",
        rows({"prompt": "a", "completion": "b", "id": 1}),
        r"no column 'text' \(there: prompt, completion, id\); set calibration.text_column to one "
        "of prompt, completion$",
    ),
    "no text at all": ("a.jsonl", rows({"id": 1}), "none of its columns holds text or a conv"),
    "no columns": ("a.jsonl", rows({}), r"no column 'text' \(there: none\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line(read, kind):
    name, content, message = BAD[kind]
    with pytest.raises(CalibrationError, match=message) as caught:
        read(name, content)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_parquet_file_and_a_directory(read, tmp_path):
    whole = parquet(tmp_path, {"text": ["one two three"] * 500})
    for cut in (len(whole) // 2, len(whole) - 1):
        with pytest.raises(CalibrationError, match="not a readable parquet file"):
            read("a.parquet", whole[:cut])
    broken = bytearray(whole)
    broken[8:60] = bytes(52)
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        read("a.parquet", bytes(broken))
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(CalibrationError, match="is a directory; give one of the files in it"):
        read("d.jsonl", None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"refuses .* \(roles must alternate\)"),
        ("{{ messages.nonsense.more }}", "refuses the conversation"),
        ("{% for %}", "refuses the conversation"),
    ],
)
def test_a_template_that_fails_is_one_line(read, template, message):
    with pytest.raises(CalibrationError, match=f"line 1: messages: the chat template {message}"):
        read("a.jsonl", rows({"messages": MESSAGES}), template)
