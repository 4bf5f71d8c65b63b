"""Questions about a real text: planted facts and constants, signatures and passages of its own.

Each is a `Note`: the line to plant, empty where the text has it already, a question and its answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Final

from kvcompress.tasks.documents import ADJECTIVES, NOUNS, Note
from kvcompress.tasks.words import VALUE_WORDS

MOST: Final = 60  # facts in one prompt; each has a noun of its own
_NAMES: Final = (
    *("Ada Lindqvist", "Bruno Okafor", "Clara Petrov", "Dmitri Alvarez", "Elena Nakamura"),
    *("Farid Johansson", "Greta Mbeki", "Hugo Castellano", "Ines Kowalski", "Jonas Haddad"),
    *("Karin Oyelaran", "Leo Marchetti", "Mina Sorensen", "Nadia Fitzgerald", "Omar Lefebvre"),
    *("Paula Gruber", "Rashid Novak", "Sofia Tanaka", "Tomas Adeyemi", "Vera Dimitrov"),
)
# sentence, question, answer
_FACTS: Final = (
    (
        "The access code of the {key} is {code}.",
        "What is the access code of the {key}?",
        "The access code of the {key} is {code}.",
    ),
    (
        "{name} bought the {key} in {year} for {price} crowns.",
        "Who bought the {key}, when, and for how much?",
        "{name} bought the {key} in {year} for {price} crowns.",
    ),
    (
        "The {key} was painted by {name}, who mixed {first}, {second} and {third} into the colour.",
        "Who painted the {key}, and what was mixed into the colour?",
        "The {key} was painted by {name}, with {first}, {second} and {third} in the colour.",
    ),
    (
        "Each {key} is delivered in a crate marked {code}, signed by {name}.",
        "What is the mark on the crate of the {key}, and who signs it?",
        "The crate of the {key} is marked {code} and signed by {name}.",
    ),
    (
        "To open the {key}, say the words {first} {second} {third}.",
        "Which words open the {key}?",
        "The words that open the {key} are {first} {second} {third}.",
    ),
)


def facts(rng: random.Random, remark: str = "") -> list[Note]:
    """Facts as sentences, each with its own key.

    Args:
        remark: how such a line begins in a conversation.
    """
    found = []
    for key in _keys(rng):
        line, question, answer = rng.choice(_FACTS)
        words = _values(rng) | {"key": key}
        asked, told = question.format_map(words), answer.format_map(words)
        found.append(Note(f"{remark}{line.format_map(words)}\n", asked, told))
    return found


def constants(rng: random.Random, spoken: bool) -> list[Note]:
    """Definitions of constants at the top level of a module.

    Args:
        spoken: ask in words; otherwise a later line of code needs the value.
    """
    found = []
    for key in _keys(rng):
        name = key.upper().replace(" ", "_")
        line = f"{name} = {_values(rng)['code']!r}"
        if spoken:
            question, answer = f"Which line of the code sets `{name}`?", f"`{line}`"
        else:
            question, answer = f"assert {name} ==", line.partition("=")[2]
        found.append(Note(f"{line}\n", question, answer))
    return found


def signatures(rng: random.Random, source: str, spoken: bool) -> list[Note]:
    """What the functions of `source` take, of those with a name of their own and two or more
    arguments."""
    defined = re.findall(r"^ *def (\w+)(\(\w[^()\n]*,[^()\n]*\)):$", source, re.MULTILINE)
    times = Counter(name for name, _ in defined)
    found = []
    for name, arguments in defined:
        if times[name] > 1:
            continue
        if spoken:
            question = f"Which line of the code defines `{name}`?"
            found.append(Note("", question, f"`def {name}{arguments}:`"))
        else:
            line = f"# {name} is defined by: def {name}"
            found.append(Note("", line, f"{arguments}:"))
    return rng.sample(found, len(found))


def quotes(
    rng: random.Random, text: str, length_tokens: int, count: Callable[[str], int]
) -> list[Note]:
    """Passages of `text` to be repeated word for word, given how they begin.

    Args:
        length_tokens: of a passage, about.
    """
    lines = text.splitlines(keepends=True)
    times = Counter(line.strip() for line in lines)
    starts = [
        place
        for place, line in enumerate(lines[: len(lines) * 3 // 4])
        if len(line.split()) >= 4 and times[line.strip()] == 1
    ]
    found = []
    for start in rng.sample(starts, min(len(starts), 6)):
        stop = start + 1
        while stop < len(lines) and count("".join(lines[start:stop])) < length_tokens:
            stop += 1
        beginning = " ".join(lines[start].split()[:6])
        question = f"Repeat the passage that begins with: {beginning}"
        found.append(Note("", question, "".join(lines[start:stop]).strip()))
    return found


def _keys(rng: random.Random) -> list[str]:
    return [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, MOST)]


def _values(rng: random.Random) -> dict[str, str]:
    first, second, third = rng.sample(VALUE_WORDS, 3)
    return {
        "name": rng.choice(_NAMES),
        "code": f"{first}-{rng.randrange(1000, 10000)}-{second}",
        "year": str(rng.randrange(1700, 2000)),
        "price": str(rng.randrange(100, 10000)),
        **{"first": first, "second": second, "third": third},
    }
