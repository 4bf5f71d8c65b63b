"""What profile and plan have to know of a tokenizer: classes of tokens, openings, which it is."""

from __future__ import annotations

import hashlib
import json
import string
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPEAT: Final = "\n\nRepeat the previous context exactly.\n"  # KVzip, section 3.2
CALIBRATION_KEY: Final = "kvcompress_calibration"  # in tokenizer_config.json
_PUNCTUATION: Final = frozenset(string.punctuation)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every token and its id, added tokens included; the same before and after a save.

    A plan names special and punctuation tokens by id, so ids are what has to agree.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(sorted(set(tokenizer.all_special_ids)))


def punct_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the ordinary tokens that are ASCII punctuation and nothing else, spaces apart."""
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    texts = tokenizer.batch_decode(
        [[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    stripped = [text.strip() for text in texts]
    return tuple(
        i for i, text in zip(ids, stripped, strict=True) if text and set(text) <= _PUNCTUATION
    )


def repeat_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The request that makes a model repeat the text before it."""
    return tuple(tokenizer(REPEAT, add_special_tokens=False)["input_ids"])


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text: its BOS token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def ids_after(tokenizer: PreTrainedTokenizerBase, text: str, opening: list[int]) -> list[int]:
    """Ids of `text` without its opening, which a chat template may have written."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[len(opening) :] if opening and ids[: len(opening)] == opening else ids


def own_calibration(tokenizer: PreTrainedTokenizerBase) -> str:
    """The built-in prompts that the tokenizer's own files ask for; empty where they name none."""
    return str(getattr(tokenizer, "init_kwargs", {}).get(CALIBRATION_KEY, ""))
