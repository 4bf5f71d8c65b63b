"""Parsing JSON and YAML that somebody else wrote, bounded in size and depth.

Other parsers disagree on some documents, and ours refuse those: repeated keys, numbers beyond 64
bits, NaN and infinity, and in YAML aliases, merge keys, tags, and plain words that YAML 1.1 and 1.2
take differently (``yes``, ``010``, ``1:30``). Every error is one line with the place in it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import yaml

# the value of a JSON or YAML document: nobody knows what it is until it has been checked
Json: TypeAlias = Any

DEPTH_LIMIT: Final = 64
YAML_LIMIT_BYTES: Final = 1 << 16
JSON_LIMIT_BYTES: Final = 256 << 20
_INTEGER_LIMIT: Final = 1 << 63

_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKETS: Final = re.compile(rb"[\[\]{}]")
_STEP: Final = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


class NotStrictError(ValueError):
    """A document that is damaged, too large, or can be read in more than one way."""


def shown(value: object, most: int = 80) -> str:
    """A text from a foreign file, made fit for one of our messages: printable and short."""
    text = (value if isinstance(value, str) else repr(value))[: most + 1]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file, at most `limit_bytes` of them.

    Raises:
        NotStrictError: where it is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except (OSError, ValueError) as error:
        raise NotStrictError(str(getattr(error, "strerror", error))) from None
    if len(data) > limit_bytes:
        raise NotStrictError(f"more than the {limit_bytes} bytes allowed")
    return data


def read_text(path: Path, limit_bytes: int) -> str:
    """`read_bytes` as UTF-8."""
    try:
        return read_bytes(path, limit_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotStrictError(f"not UTF-8 (byte {error.start})") from None


# ---- JSON
def load_json(text: str | bytes, limit_bytes: int = JSON_LIMIT_BYTES, *, ours: bool = True) -> Json:
    """The value of a JSON document in UTF-8.

    Args:
        ours: whether kvcompress wrote the document. Configurations of other programs may hold NaN,
            infinity and whole numbers of any size; ours may not.

    Raises:
        NotStrictError: saying what is wrong.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > limit_bytes:
        raise NotStrictError(f"{len(data)} bytes, more than the {limit_bytes} allowed")
    brackets = _BRACKETS.findall(_STRING.sub(b"", data))
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > DEPTH_LIMIT:
        raise NotStrictError(f"nested more than {DEPTH_LIMIT} levels deep")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant if ours else None,
            parse_float=_float if ours else None,
            parse_int=_int if ours else None,
        )
    except NotStrictError:
        raise
    except (ValueError, RecursionError) as error:
        raise NotStrictError(f"not JSON ({shown(str(error), 200)})") from None
    if b"\\u" in data and not _encodable(value):
        raise NotStrictError("a text in it holds half of a surrogate pair")
    return value


def _encodable(value: Json) -> bool:
    """Whether every text in it can be written as UTF-8: half of a surrogate pair cannot."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return all(_encodable(key) and _encodable(inner) for key, inner in value.items())
    return not isinstance(value, list) or all(map(_encodable, value))


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(k for k, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise NotStrictError(f"the key {shown(twice)!r} stands twice in one object")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise NotStrictError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotStrictError(f"{text[:40]} is larger than any number")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -_INTEGER_LIMIT <= int(text) < _INTEGER_LIMIT:
        raise NotStrictError(f"{text[:40]} does not fit 64 bits")
    return int(text)


# ---- YAML
_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# what YAML 1.1 reads as something other than the text, and YAML 1.2 or a person does not
_TWO_WAYS: Final = {
    "a truth value to YAML 1.1": re.compile(r"(?i:y|n|yes|no|on|off)"),
    "octal to some readers and decimal to others": re.compile(r"[-+]?0o?[0-9_]+"),
    "a number to some readers": re.compile(
        r"[-+]?(0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?)"
    ),
    "a number in base 60 to YAML 1.1": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    "no number that can be used here": re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)"),
    "a date to YAML 1.1": re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?"),
}


def load_yaml(text: str, limit_bytes: int = YAML_LIMIT_BYTES) -> tuple[Json, list[str]]:
    """The value of a YAML document, and its problems, each with its line.

    Returns:
        Mappings, lists, strings, ints, floats, bools and None; where there are problems the value
        is read as far as it can be.

    Raises:
        NotStrictError: where it is no YAML, or too large or deep to be read.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limit_bytes:
        raise NotStrictError(f"{size} bytes, more than the {limit_bytes} allowed")
    try:
        _check_events(text)
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, NotStrictError):
            raise
        raise NotStrictError(f"not YAML: {shown(' '.join(str(error).split()), 400)}") from None
    problems: list[str] = []
    return (None if node is None else _value(node, problems)), problems


def _check_events(text: str) -> None:
    """Bound what composing a document costs, before it is composed."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = _line(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise NotStrictError(f"line {line}: an alias or anchor (& or *); write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_LIMIT:
                raise NotStrictError(f"line {line}: nested more than {DEPTH_LIMIT} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise NotStrictError(f"line {line}: the tag {shown(tag)}; write the plain value")


def _line(place: yaml.Event | yaml.Node) -> int:
    assert place.start_mark is not None
    return place.start_mark.line + 1


def _value(node: yaml.Node, problems: list[str]) -> Json:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, problems) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, problems)
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, problems)


def _mapping(node: yaml.MappingNode, problems: list[str]) -> dict[str, Json]:
    made: dict[str, Json] = {}
    for key_node, value_node in node.value:
        line = _line(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"a list or mapping as a key on line {line}")
            continue
        key = key_node.value
        if key == "<<" and key_node.style is None:
            problems.append(f"<<: a merge key on line {line}; write the keys out")
        elif key in made:
            problems.append(f"{shown(key)}: duplicate key on line {line}")
        made[key] = _value(value_node, problems)
    return made


def _scalar(node: yaml.ScalarNode, problems: list[str]) -> Json:
    text: str = node.value
    if node.style is not None:  # quoted, or a block of text
        return text
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _DECIMAL.fullmatch(text) or _FLOAT.fullmatch(text):
        return _number(text, node, problems)
    for reason, pattern in _TWO_WAYS.items():
        if pattern.fullmatch(text):
            problems.append(
                f"{shown(text, 40)} on line {_line(node)} is {reason}: write true, false or "
                "a decimal number, or put it in quotes"
            )
    return text


def _number(text: str, node: yaml.ScalarNode, problems: list[str]) -> int | float:
    try:
        return _int(text) if _DECIMAL.fullmatch(text) else _float(text)
    except NotStrictError as error:
        problems.append(f"line {_line(node)}: {error}")
        return 0
