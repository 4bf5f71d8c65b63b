"""Calibration prompts: token ids of one length, from the user's data, our own, or both."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvcompress.errors import CalibrationError
from kvcompress.profile.builtin.notes import note_prompts
from kvcompress.profile.builtin.prompts import real_prompts
from kvcompress.profile.kinds import Prompt
from kvcompress.profile.texts import spread, streams, texts
from kvcompress.recipe import BUILTIN, Calibration
from kvcompress.tokenizer import CALIBRATION_KEY, ids_after, opening_ids, own_calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCKS: Final = 4  # blocks drawn from a large file for each prompt
_CHARACTERS: Final = 8  # length of a block per token of a prompt: about two English prompts


def read_prompts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """`calibration.prompts` prompts of exactly `calibration.tokens` token ids.

    Each begins with the ids that the tokenizer puts before a text, usually its BOS token. The seed
    chooses them from the whole of a file: it draws blocks of consecutive text, every one as likely
    as any other, and draws prompts from those. A data set is shuffled by the seed and read only as
    far as the prompts need. Prompts of several sources alternate, so that the first few, which some
    measurements use alone, are of all sources.

    Raises:
        CalibrationError: if data is missing, empty or too short, or lacks the text column; if there
            are fewer prompts than sources.
    """
    counts = _counts(calibration)
    found = []
    for number, (source, count) in enumerate(counts.items()):
        part = calibration.model_copy(update={"data": source, "mix": None, "prompts": count})
        own = source not in BUILTIN
        prompts = _own(part, tokenizer, calibration.prompts) if own else _builtin(part, tokenizer)
        found += [((i + 0.5) / count, number, prompt) for i, prompt in enumerate(prompts)]
    return [prompt for *_, prompt in sorted(found, key=lambda each: each[:2])]


def load_prompts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of `read_prompts`."""
    return [prompt.ids for prompt in read_prompts(calibration, tokenizer)]


def asked_for(calibration: Calibration, data: str | None, mix: Sequence[str]) -> Calibration:
    """`calibration` with what a command line says of its sources.

    Args:
        data: one source. A user's own data gives half of the prompts and `recall` the rest: few
            texts ask for what stands far above, and without such prompts every head seems to do
            with a window. With less than half, the losses of what is far would drown in the others.
        mix: ``SOURCE=SHARE`` each, and nothing beside them.

    Raises:
        CalibrationError: if both are given, or a share is none.
    """
    if data is not None and mix:
        raise CalibrationError("give --data or --mix, not both: --mix SOURCE=SHARE names it too")
    if mix:
        return _with(calibration, data="builtin", mix=dict(_share(text) for text in mix))
    if data is None:
        return calibration
    if data in BUILTIN:
        return _with(calibration, data=data, mix=None)
    return _with(calibration, data="builtin", mix={"recall": 0.5, data: 0.5})


def _with(calibration: Calibration, **changes: object) -> Calibration:
    said = calibration.model_dump(exclude_unset=True)
    return Calibration.model_validate({**said, **changes})


def _share(text: str) -> tuple[str, float]:
    source, _, share = text.rpartition("=")
    try:
        return source, float(share)
    except ValueError:
        raise CalibrationError(f"--mix {text!r}: write SOURCE=SHARE, like recall=0.5") from None


def _counts(calibration: Calibration) -> dict[str, int]:
    """How many prompts each source gives: the largest remainders are rounded up, none to zero."""
    shares = calibration.sources()
    if calibration.prompts < len(shares):
        raise CalibrationError(
            f"calibration.prompts is {calibration.prompts}, calibration.mix has {len(shares)} "
            f"sources; set calibration.prompts to {len(shares)} or more"
        )
    whole = sum(shares.values())
    exact = {source: calibration.prompts * share / whole for source, share in shares.items()}
    counts = {source: max(1, int(count)) for source, count in exact.items()}
    while (left := calibration.prompts - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        open_to = [s for s in counts if counts[s] + step > 0]
        counts[max(open_to, key=lambda s: step * (exact[s] - counts[s]))] += step
    return counts


def _builtin(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """See `BUILTIN`. A tokenizer may name the prompts that its model was made for."""
    named = own_calibration(tokenizer)
    if named not in ("", "notes"):
        raise CalibrationError(
            f"{CALIBRATION_KEY} in tokenizer_config.json is {named!r}; this version knows 'notes'"
        )
    make = note_prompts if "notes" in (calibration.data, named) else real_prompts
    return make(calibration, tokenizer, texts=calibration.data != "recall")


def _own(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, all_prompts: int
) -> list[Prompt]:
    """Prompts of one file or data set, see `read_prompts`.

    Args:
        all_prompts: their number with those of other sources.
    """
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
            drawn = rng.sample(found, calibration.prompts)
            return [Prompt(opening + piece, "own") for piece in drawn]
        if whole:
            share = calibration.prompts / all_prompts
            raise _too_little(calibration, share, sum(map(len, ids)), sum(map(len, runs)), fresh)
        size *= 2


def _cut(ids: list[int], length: int, rng: random.Random) -> list[list[int]]:
    """As many pieces of `length` as fit, from a random start on: the end is left out as often."""
    start = rng.randrange(len(ids) % length + 1)
    return [ids[i : i + length] for i in range(start, len(ids) - length + 1, length)]


def _ids(tokenizer: PreTrainedTokenizerBase, run: Sequence[str], opening: list[int]) -> list[int]:
    """Tokens of texts one after the other, without the opening that a chat template gives each."""
    return [i for text in run for i in ids_after(tokenizer, text, opening)]


def _too_little(
    calibration: Calibration, share: float, tokens: int, entries: int, fresh: int
) -> CalibrationError:
    if not tokens:
        return CalibrationError(
            f"{calibration.data}: empty, no token in {entries} entries; give a file with some text"
        )
    return CalibrationError(
        f"{calibration.data}: {tokens} tokens found, {calibration.prompts} prompts of "
        f"{calibration.tokens} tokens need {calibration.prompts * fresh}; give more text, or set "
        f"calibration.prompts to {max(1, int(tokens // fresh / share))} or calibration.tokens lower"
    )


def data_hash(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of the token ids. It tells whether two profiles saw the same data and reveals none."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
