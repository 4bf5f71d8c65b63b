"""Keys that point elsewhere than the others are kept: no queries, no attention.

Source: KeyDiff (arXiv 2504.15364): −cos of a key to the mean of all unit keys.
"""

from __future__ import annotations

from torch import Tensor, nn

from kvcompress.evict.scorers.base import PromptScorer, Tokens


class KeyDiffScorer(PromptScorer):
    """Of a prompt's keys as they are stored, that is after RoPE; padding has no part in the mean.

    Differs from the paper: decoded tokens are kept newest first, and the mean stays the prompt's.
    """

    def finish(self, score: Tensor, tokens: Tokens) -> Tensor:
        unit = nn.functional.normalize(tokens.key.float(), dim=-1)
        real = tokens.valid[:, None, :, None].to(unit.dtype)
        anchor = (unit * real).sum(2, keepdim=True)  # its length does not matter
        return -(unit * nn.functional.normalize(anchor, dim=-1)).sum(-1)


KEY_DIFF = KeyDiffScorer("key_diff")
