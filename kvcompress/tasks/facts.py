"""What real models are asked for: short facts, pass keys, constants in code, and small sums.

An answer is one common word or a short number, and a question can be put as the beginning of the
sentence that it ends: a model of a hundred million parameters answers then, too.
"""

from __future__ import annotations

import random
from typing import Final

from kvcompress.tasks.documents import ADJECTIVES, NOUNS, Note
from kvcompress.tasks.words import VALUE_WORDS

CHAIN_STEPS: Final = 8
_HIGHEST: Final = 9  # a sum stays one digit
_LARGEST_STEP: Final = 2
_SHARED: Final = 4  # keys of `alike` that have a word in common
_DOORS: Final = "red blue green yellow white black brown gray pink purple orange silver".split()


def facts(rng: random.Random, count: int) -> list[Note]:
    """``The secret word of the amber river is lemon.``, with keys that share no noun."""
    keys = [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, count)]
    return _secrets(rng, keys)


def alike(rng: random.Random, count: int) -> list[Note]:
    """As `facts`; every key has each of its two words in common with others."""
    nouns = rng.sample(NOUNS, _SHARED)
    adjectives = rng.sample(ADJECTIVES, -(-count // _SHARED))
    keys = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    return _secrets(rng, keys[:count])


def _secrets(rng: random.Random, keys: list[str]) -> list[Note]:
    words = rng.sample(VALUE_WORDS, len(keys))
    return [_note(f"The secret word of the {k} is", w) for k, w in zip(keys, words, strict=True)]


def pass_keys(rng: random.Random, count: int) -> list[Note]:
    """A number of four digits for each of at most eight doors."""
    doors = rng.sample(_DOORS, min(count, 8))
    keys = [(f"Pass key of the door, {door}:", rng.randint(1000, 9999)) for door in doors]
    return [Note(f"{stem} {key}. Remember it.\n", stem, f" {key}") for stem, key in keys]


def _note(stem: str, answer: str) -> Note:
    return Note(f"{stem} {answer}.\n", stem, f" {answer}")


def constants(rng: random.Random, count: int) -> list[Note]:
    """``RIVER = 482`` on a line of its own."""
    stems = [f"{noun.upper()} =" for noun in rng.sample(NOUNS, count)]
    values = [rng.randint(100, 999) for _ in stems]
    pairs = zip(stems, values, strict=True)
    return [Note(f"\n{stem} {value}\n\n", stem, f" {value}") for stem, value in pairs]


def asked(stem: str) -> str:
    """The question that the sentence `stem` begins to answer."""
    return f"What is {stem[:1].lower()}{stem[1:].removesuffix(' is')}?"


def chain(rng: random.Random, steps: int = CHAIN_STEPS) -> list[tuple[str, str]]:
    """Sums one after another, each on the result before: ``(" 3 + 4 =", " 7")``."""
    value, made = rng.randint(1, _HIGHEST), []
    for _ in range(steps):
        choices = [s for s in range(-_LARGEST_STEP, _LARGEST_STEP + 1) if s]
        step = rng.choice([s for s in choices if 0 <= value + s <= _HIGHEST])
        made.append((f" {value} {'+' if step > 0 else '-'} {abs(step)} =", f" {value + step}"))
        value += step
    return made


def chain_line(made: list[tuple[str, str]]) -> str:
    """A chain as one line of a prompt."""
    return "Chain:" + ",".join(text + answer for text, answer in made) + ".\n"
