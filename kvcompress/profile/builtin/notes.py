"""Calibration prompts of the demo model: notes between text, asked for at the end, and text.

They have the form that this model was trained on, see `kvcompress.tasks.documents`.

Three prompts in four are recall documents, because only a question shows which heads look far back;
plain text shows the rest. The rows that are measured are the last of each prompt, so questions and
answers fill at least those. In two of the three nothing is asked before them, so that a head's
tokens are chosen before anybody knows the question; in the third, earlier questions vote.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from kvcompress.profile.builtin.real_text import calibration_text
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.kinds import Kind, Prompt
from kvcompress.recipe import Calibration
from kvcompress.tasks.documents import Note, lay_out, recall_notes
from kvcompress.tokenizer import opening_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS_TO_RECALL = (2, 6, 16)
_MOST_NOTES = 40


def note_prompts(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, texts: bool = True
) -> list[Prompt]:
    """See the module docstring; every prompt has `calibration.tokens` tokens.

    Args:
        texts: whether plain text is among them.
    """
    opening = opening_ids(tokenizer)
    fresh = calibration.tokens - len(opening)
    filler = calibration_text()

    @lru_cache(100_000)
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    text_ids = encode(filler)
    prompts = []
    for number in range(calibration.prompts):
        rng = random.Random(calibration.seed * 1_000_003 + number)
        kind: Kind = "text" if texts and number % 4 == 3 else "notes"
        if kind == "text":
            start = rng.randrange(len(text_ids))
            ids = [text_ids[(start + i) % len(text_ids)] for i in range(fresh)]
        else:
            ids = _recall(rng, filler, fresh, encode, hidden=number % 4 != 1)
        prompts.append(Prompt(opening + ids, kind))
    return prompts


def _recall(
    rng: random.Random,
    filler: str,
    length: int,
    encode: Callable[[str], tuple[int, ...]],
    hidden: bool,
) -> list[int]:
    """A recall document and its questions, exactly `length` tokens.

    Args:
        hidden: no question is answered before the rows that are measured; the first may begin.
    """

    def count(text: str) -> int:
        return len(encode(text))

    asked_tokens = max(held_out_rows(length) + 16, int(length * rng.uniform(0.12, 0.25)))
    if hidden:
        asked_tokens = held_out_rows(length)
    context = length - asked_tokens
    notes = _fitting(rng, int(context * rng.uniform(0.15, 0.7)), count)
    document, order, _ = lay_out(rng, notes, filler, context, count)
    ids = list(encode(document))
    while len(ids) < length:
        for note in rng.sample(order, len(order)):
            ids += encode(f"{note.question}{note.answer}\n")
    return ids[:length]


def _fitting(rng: random.Random, room_tokens: int, count: Callable[[str], int]) -> list[Note]:
    """As many notes as fit into `room_tokens`, at least one."""
    notes = recall_notes(rng, _MOST_NOTES, rng.choice(_WORDS_TO_RECALL))
    fitting: list[Note] = []
    for note in notes:
        room_tokens -= count(note.line)
        if room_tokens < 0:
            break
        fitting.append(note)
    return fitting or [min(notes, key=lambda note: count(note.line))]
