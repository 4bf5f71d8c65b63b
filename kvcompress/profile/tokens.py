"""What a plan has to know of a tokenizer: special tokens, punctuation, how a text opens."""

from __future__ import annotations

import string
from typing import Any, Final

REPEAT: Final = "\n\nRepeat the previous context exactly.\n"  # KVzip, section 3.2
_PUNCTUATION: Final = frozenset(string.punctuation)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    return tuple(sorted(set(tokenizer.all_special_ids)))


def punct_ids(tokenizer: Any) -> tuple[int, ...]:
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


def repeat_ids(tokenizer: Any) -> tuple[int, ...]:
    """What asks a model to repeat the text before it."""
    return tuple(tokenizer(REPEAT, add_special_tokens=False)["input_ids"])


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text; its BOS token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []
