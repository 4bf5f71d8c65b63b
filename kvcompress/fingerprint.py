"""What makes two tokenizers the same to a plan."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over every token and its id, added tokens included; the same before and after a save.

    A plan names special and punctuation tokens by id, so ids are what has to agree.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
