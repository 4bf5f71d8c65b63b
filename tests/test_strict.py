"""JSON and YAML of other people: read in one way, or refused in one line, in bounded time."""

import json
import random
import time

import pytest
import yaml

from kvcompress import Recipe
from kvcompress.errors import KVCompressError
from kvcompress.strict import NotStrictError, load_json, load_yaml

BAD_JSON = {
    "{": "not JSON",
    "": "not JSON",
    '{"a": 1, "a": 2}': "the key 'a' stands twice",
    '{"b": {"a": 1, "a": 1}}': "the key 'a' stands twice",
    "NaN": "NaN is no JSON number",
    "[-Infinity]": "-Infinity is no JSON number",
    "1e999": "1e999 is larger than any number",
    "9223372036854775808": "does not fit 64 bits",
    "-9223372036854775809": "does not fit 64 bits",
    "1" * 5000: "does not fit 64 bits",
    "[" * 65 + "]" * 65: "nested more than 64 levels deep",
    '{"a":' * 100_000: "nested more than 64 levels deep",
    "[1] x": "not JSON",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:24])
def test_json_that_is_refused(text):
    start = time.monotonic()
    with pytest.raises(NotStrictError, match=BAD_JSON[text]):
        load_json(text)
    assert time.monotonic() - start < 20


def test_json_that_is_read():
    value = {"a": [1, -2.5e-3, True, None, 'x"]}[{\\'], "ü": {"": "\u2028"}, "n": 2**63 - 1}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert load_json(text) == value
    assert load_json("[" * 64 + "]" * 64)
    with pytest.raises(NotStrictError, match="8 bytes, more than the 7 allowed"):
        load_json("[1, 2,3]", limit_bytes=7)
    with pytest.raises(NotStrictError, match="not JSON"):
        load_json(b'"\xff"')


# ---- YAML
REFUSED_YAML = {
    "a: &x 1": "line 1: an alias or anchor",
    "a: 1\nb: *a": "line 2: an alias or anchor",
    "a: !!int 1": "line 1: the tag tag:yaml.org,2002:int",
    "a: !!python/object/apply:os.system [x]": "the tag tag:yaml.org,2002:python",
    "a: " + "[" * 5000: "line 1: nested more than 64 levels deep",
    "a: [1": "not YAML: while parsing",
    "a: \x00": "not YAML: unacceptable character",
    "a: 1\n---\nb: 1": "not YAML: expected a single document",
    "a: " + "x" * 70_000: "70003 bytes, more than the 65536 allowed",
}
PROBLEMS = {
    "010": "octal to some readers",
    "0o10": "octal to some readers",
    "-007": "octal to some readers",
    "0x1F": "a number to some readers",
    "0b11": "a number to some readers",
    "1_000": "a number to some readers",
    "1:30": "base 60",
    "yes": "a truth value",
    "No": "a truth value",
    "on": "a truth value",
    ".inf": "no number that can be used",
    "-.INF": "no number that can be used",
    ".nan": "no number that can be used",
    "2026-11-27": "a date",
    "1e999": "larger than any number",
    "18446744073709551616": "does not fit 64 bits",
}


@pytest.mark.parametrize("text", REFUSED_YAML, ids=lambda text: text[:24].replace("\x00", "NUL"))
def test_yaml_that_is_refused(text):
    start = time.monotonic()
    with pytest.raises(NotStrictError, match=REFUSED_YAML[text]):
        load_yaml(text)
    assert time.monotonic() - start < 30


def test_aliases_of_aliases_are_not_expanded():
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for j in range(20):
        name, before = chr(98 + j), chr(97 + j)
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
    with pytest.raises(NotStrictError, match="alias or anchor"):
        load_yaml("\n".join(lines))


@pytest.mark.parametrize("word", PROBLEMS)
def test_a_word_that_is_read_two_ways_is_a_problem_with_its_line(word):
    value, problems = load_yaml(f"x: 1\ny: {word}\n")
    assert value["x"] == 1 and len(problems) == 1
    assert PROBLEMS[word] in problems[0] and "line 2" in problems[0]
    value, problems = load_yaml(f"y: '{word}'")
    assert value == {"y": word} and problems == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("-12", -12), ("+3", 3), ("1e-3", 1e-3), ("2.50", 2.5), (".5", 0.5), ("1.", 1.0),
     ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("8GiB", "8GiB"),
     ("one two", "one two"), ("'1'", "1"), ("|\n  1\n", "1\n"), ("a-b.c", "a-b.c")],
)  # fmt: skip
def test_a_plain_value(text, expected):
    value, problems = load_yaml(f"x: {text}")
    assert problems == [] and value == {"x": expected}
    assert type(value["x"]) is type(expected)


def test_keys_are_words_and_stand_once():
    text = "a: 1\n<<: {b: 1}\na: 2\n? [1]\n: 2\n"
    value, problems = load_yaml(text)
    assert problems == [
        "<<: a merge key on line 2; write the keys out",
        "a: duplicate key on line 3",
        "a list or mapping as a key on line 4",
    ]
    assert load_yaml("1: x")[0] == {"1": "x"}


def test_every_recipe_reads_as_yaml_reads_it():
    from pathlib import Path

    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert load_yaml(text) == (yaml.safe_load(text), []), path.name


def test_a_recipe_that_was_damaged_anywhere_ends_in_our_error(request):
    """Random edits of the text; what is still a recipe must say the same when written out again."""
    seed = request.config.option.hypothesis_seed
    rng = random.Random(f"{seed} recipes")
    text = Recipe.from_yaml("name: x\npolicy: {kind: bytes, keep_ratio: 0.25}").to_yaml()
    pieces = [*"[{#%|'\"\n\x00\u2028\ud800", "&a ", "*a", "- ", ": ", "!!int ", "1e999", "-1"]
    pieces += ["yes", "010", "99999999999999999999", "null", "  "]
    read = 0
    for number in range(400):
        changed = text
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            cut = rng.randint(0, 6)
            changed = changed[:at] + rng.choice(pieces) + changed[at + cut :]
        try:
            recipe = Recipe.from_yaml(changed)
        except KVCompressError as error:
            assert "\n" not in str(error), (number, seed)
            continue
        read += 1
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe, (number, seed)
    assert read < 200
