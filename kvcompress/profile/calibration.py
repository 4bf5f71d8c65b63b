"""Calibration prompts: lists of token ids of one length, from the user's data or our own."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvcompress.errors import CalibrationError
from kvcompress.profile.builtin import builtin_prompts
from kvcompress.profile.texts import spread, streams, texts
from kvcompress.recipe import Calibration
from kvcompress.tokenizer import opening_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN: Final = "builtin"
_BLOCKS: Final = 4  # blocks drawn from a large file for each prompt
_CHARACTERS: Final = 8  # length of a block per token of a prompt: about two English prompts


def load_prompts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """`calibration.prompts` lists of exactly `calibration.tokens` token ids.

    Each begins with the ids that the tokenizer puts before a text, usually its BOS token. The seed
    chooses them from the whole of a file: it draws blocks of consecutive text, every one as likely
    as any other, and draws prompts from those. A data set is shuffled by the seed and read only as
    far as the prompts need.

    Raises:
        CalibrationError: if the data is missing, empty or too short, or lacks the text column.
    """
    if calibration.data == BUILTIN:
        return builtin_prompts(calibration, tokenizer)
    opening = opening_ids(tokenizer)
    fresh = calibration.tokens - len(opening)
    wanted, size = calibration.prompts * _BLOCKS, fresh * _CHARACTERS
    while True:
        rng = random.Random(calibration.seed)
        source = texts(calibration, tokenizer)
        blocks, whole = spread(source, rng, wanted, size, first=streams(calibration))
        runs = [[text for block in blocks for text in block]] if whole else blocks
        if calibration.data.lower().endswith(".txt"):  # its lines make up one text
            runs = [["".join(run)] for run in runs]
        ids = [_ids(tokenizer, run, opening) for run in runs]
        found = [piece for run in ids for piece in _cut(run, fresh, rng)]
        if len(found) >= calibration.prompts:
            return [opening + piece for piece in rng.sample(found, calibration.prompts)]
        if whole:
            raise _too_little(calibration, sum(map(len, ids)), sum(map(len, runs)), fresh)
        size *= 2


def _cut(ids: list[int], length: int, rng: random.Random) -> list[list[int]]:
    """As many pieces of `length` as fit, from a random start on: the end is left out as often."""
    start = rng.randrange(len(ids) % length + 1)
    return [ids[i : i + length] for i in range(start, len(ids) - length + 1, length)]


def _ids(tokenizer: PreTrainedTokenizerBase, run: Sequence[str], opening: list[int]) -> list[int]:
    """Tokens of texts one after the other, without the opening that a chat template gives each."""
    ids: list[int] = []
    for text in run:
        more = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += more[len(opening) :] if opening and more[: len(opening)] == opening else more
    return ids


def _too_little(
    calibration: Calibration, tokens: int, entries: int, fresh: int
) -> CalibrationError:
    if not tokens:
        return CalibrationError(
            f"{calibration.data}: empty, no token in {entries} entries; give a file with some text"
        )
    return CalibrationError(
        f"{calibration.data}: {tokens} tokens found, {calibration.prompts} prompts of "
        f"{calibration.tokens} tokens need {calibration.prompts * fresh}; give more text, or set "
        f"calibration.prompts to {max(1, tokens // fresh)} or calibration.tokens lower"
    )


def data_hash(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of the token ids. It tells whether two profiles saw the same data and reveals none."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
