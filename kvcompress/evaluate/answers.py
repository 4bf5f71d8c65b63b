"""What belongs to the tokenizer in an evaluation: prompts in tokens, and which answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPARE_TOKENS: Final = 2  # an answer may run this far over the true one before it is cut off


@final
class Grader:
    """See the module docstring."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else (tokenizer.eos_token_id or 0)
        self._ends: dict[int, bool] = {}

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """Token ids, behind the tokenizer's begin token if `begin`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=begin, verbose=False)["input_ids"]
        return ids

    def limit(self, answer: str) -> int:
        """Tokens after which the attempt at `answer` is cut off."""
        return len(self.encode(answer)) + _SPARE_TOKENS

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer: a period, a line end or the end of the text."""
        if token not in self._ends:
            piece = self.tokenizer.decode([token])
            self._ends[token] = (
                "." in piece or "\n" in piece or token == self.tokenizer.eos_token_id
            )
        return self._ends[token]

    def is_right(self, tokens: Sequence[int], answer: str) -> bool:
        """Whether the first line of the generated `tokens` is `answer`, word for word."""
        return str(self.tokenizer.decode(list(tokens))).split("\n")[0].strip() == answer.strip()
