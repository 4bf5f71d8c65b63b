"""Strict readers of JSON and YAML: the only ones that a file of ours, or a model's, goes through.

What a file may do to its reader is bounded: bytes, depth, no aliases, no tags, no key twice. What
it means must be plain: no number that is not finite, no `010`, no surrogate without its partner.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

DEPTH: Final = 64  # of brackets in brackets; our own files need 8, tokenizers about 12
YAML_BYTES: Final = 2**16  # a resolved recipe takes 2 KiB; PyYAML reads 100 KiB in a second
SMALL_BYTES: Final = 2**20  # settings: generation_config.json, tokenizer_config.json
CONFIG_BYTES: Final = 2**24  # config.json: some carry a label for every class
PLAN_BYTES: Final = 2**26  # 1,024 layers of 128 heads
INDEX_BYTES: Final = 2**26  # a line for every tensor
PROFILE_BYTES: Final = 2**28  # as plans, with 100 candidates for every head


class UnreadableError(ValueError):
    """A text that the readers refuse; the message says why, the caller says where."""


def shown(value: object, most: int = 80) -> str:
    """Something that a file said, for a line of ours."""
    text = str(value) if isinstance(value, str) else repr(value)
    text = text[: most + 1]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def read_text(path: Path, limit_bytes: int) -> str:
    """A UTF-8 file of at most `limit_bytes`.

    Raises:
        UnreadableError: for anything else, a directory or a missing file included.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except (OSError, ValueError) as error:
        raise UnreadableError(str(getattr(error, "strerror", error))) from None
    return decoded(data, limit_bytes)


def decoded(data: bytes, limit_bytes: int) -> str:
    """`read_text` of bytes in memory."""
    if len(data) > limit_bytes:
        raise UnreadableError(f"larger than {limit_bytes} bytes, which no file of its kind is")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 (byte {error.start})") from None


def read_json(path: Path, limit_bytes: int, *, finite: bool = True) -> Any:
    """`parse_json` of a file."""
    return parse_json(read_text(path, limit_bytes), finite=finite)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        finite: refuse NaN and infinities; foreign configurations may hold them.

    Raises:
        UnreadableError: for text that is not JSON, deeper than `DEPTH`, or that has a key twice.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_float=_finite if finite else None,
            parse_constant=_refuse_constant if finite else None,
        )
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(f"brackets are nested deeper than {DEPTH}") from None
    except ValueError as error:
        raise UnreadableError(f"not JSON ({error})") from None
    _check_values(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"the key {shown(twice)!r} is there twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnreadableError(f"the number {shown(text, 40)} is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise UnreadableError(f"{text} is not a number of JSON; it must be finite")


def _check_values(value: Any) -> None:
    """Depth, and text that can be encoded again."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise UnreadableError(f"brackets are nested deeper than {DEPTH}")
        for text in (text for item in level for text in _texts(item)):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UnreadableError(f"the text {shown(text, 40)} holds half of a surrogate pair")
        level = [inner for item in level for inner in _inner(item)]
        depth += 1


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, and its problems that leave the value readable: repeated keys.

    Raises:
        UnreadableError: for text that is not YAML, or uses what the readers refuse, with the line.
    """
    if len(text) > YAML_BYTES:
        raise UnreadableError(f"larger than {YAML_BYTES} bytes, which no recipe is")
    problems: list[str] = []
    try:
        loader = _Loader(text, problems)
        return loader.get_single_data(), problems
    except UnreadableError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UnreadableError(f"not YAML: {shown(' '.join(str(error).split()), 400)}") from None


_DECIMAL: Final = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_MERGE, _INT, _FLOAT, _TEXT = (
    f"tag:yaml.org,2002:{name}" for name in ("merge", "int", "float", "str")
)
# dates and `=` are text here: nothing that we read has such a type
_AS_TEXT: Final = frozenset(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value"))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without aliases, tags, merge keys, and numbers that can be read two ways."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in found if tag not in _AS_TEXT]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, problems: list[str]) -> None:
        super().__init__(text)
        self.problems, self.depth = problems, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"*{shown(event.anchor)} repeats another value; write the value out")
        if event.tag not in (None, "!"):
            _refuse(event, f"the tag {shown(event.tag)} is not read; leave it out")
        self.depth += 1
        if self.depth > DEPTH:
            _refuse(event, f"nested deeper than {DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key must be a word")
            if key.tag == _MERGE:
                _refuse(key, "<< merges other settings in; write them out")
            if key.value in seen:
                line = key.start_mark.line + 1
                self.problems.append(f"{shown(key.value)}: duplicate key on line {line}")
            seen.add(key.value)
            key.tag = _TEXT  # `on` and `1` are words in this place
        return super().construct_mapping(node, deep=True)


def _check_scalar(node: yaml.ScalarNode) -> None:
    text: str = node.value
    if node.tag == _INT and not _DECIMAL.fullmatch(text):
        _refuse(
            node,
            f"{shown(text, 40)} is another number in other readers; write it in decimal without "
            "leading zeros, or quote it",
        )
    if node.tag == _INT and len(text) > 40 or node.tag == _FLOAT and _odd(text):
        _refuse(node, f"{shown(text, 40)} is not a finite decimal number; write one, or quote it")


def _odd(text: str) -> bool:
    """Infinities, NaN, sexagesimal numbers, and what overflows."""
    try:
        return not math.isfinite(float(text.replace("_", "")))
    except ValueError:
        return True


def _refuse(place: Any, reason: str) -> NoReturn:
    raise UnreadableError(f"line {place.start_mark.line + 1}: {reason}")
