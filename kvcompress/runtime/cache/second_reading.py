"""A second reading of the prompt, for scorers that count the attention of a repetition.

Source: KVzip (arXiv 2505.23416), section 3. The model needs the tokens that it attends to when it
repeats its context. So the cache holds the prompt uncompressed, and the model reads it again in
chunks, each behind a request to repeat and the last 8 tokens of the chunk before.
Differs from the paper: the softmax runs over the whole held prompt, the request and the chunk; the
chunks are as long as the positions that the plan's constants cover allow, at most 2048 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvcompress.errors import KVCompressError
from kvcompress.evict.scorers import scorer
from kvcompress.plan import Plan
from kvcompress.runtime.names import as_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcompress.runtime.cache.cache import CompressedCache

MOST_TOKENS: Final = 2048
FEWEST_TOKENS: Final = 32
LEAD_TOKENS: Final = 8  # of the chunk before, so that the model knows where the chunk goes on


class SecondReading:
    """Remembers the tokens of the first prompt until it has been read again.

    Attributes:
        wanted: whether the plan's scorer needs a second reading that has not happened yet.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.wanted = "repeat" in scorer(plan.scorer).needs
        self.reading = False
        self._ids: list[Tensor] = []
        self._mask: Tensor | None = None
        self._embeddings = False

    def note(self, ids: Tensor | None, length: int, mask: Tensor | None) -> None:
        """A forward of the prompt comes: its ``[B, T]`` tokens and ``[B, seen + T]`` mask."""
        if self.reading or not length:
            return
        self._embeddings = self._embeddings or ids is None
        if ids is not None:
            self._ids.append(ids.detach())
        self._mask = mask

    def check_done(self) -> None:
        """
        Raises:
            KVCompressError: where the prompt still has to be read again.
        """
        if self.wanted:
            raise KVCompressError(
                f"the scorer {self.plan.scorer!r} needs the model to read the prompt again: call "
                "cache.finish_prompt(model) after the prompt's last forward"
            )

    @torch.inference_mode()
    def read_again(self, model: PreTrainedModel, cache: CompressedCache) -> None:
        """Feed the prompt once more, chunk by chunk; its queries vote, and nothing is stored."""
        if self._embeddings:
            raise KVCompressError(
                f"the scorer {self.plan.scorer!r} repeats the prompt and needs its tokens: pass "
                "input_ids, not embeddings"
            )
        ids = torch.cat(self._ids, 1)
        mask = torch.ones_like(ids) if self._mask is None else self._mask.to(ids.device).long()
        ask = torch.tensor(self.plan.repeat_ids, dtype=ids.dtype, device=ids.device)
        ask = ask.expand(ids.shape[0], -1)
        room = self.plan.max_position - ids.shape[1] - ask.shape[1] - LEAD_TOKENS
        size = min(MOST_TOKENS, max(FEWEST_TOKENS, room))
        self.reading = True
        try:
            for low in range(0, ids.shape[1], size):
                part = slice(max(0, low - LEAD_TOKENS), low + size)
                self._chunk(model, cache, ids, mask, ask, part)
        finally:
            self.reading = False
        self.wanted, self._ids = False, []

    def _chunk(
        self,
        model: PreTrainedModel,
        cache: CompressedCache,
        ids: Tensor,
        mask: Tensor,
        ask: Tensor,
        part: slice,
    ) -> None:
        chunk = torch.cat([ask, ids[:, part]], 1)
        shown = torch.cat([torch.ones_like(ask), mask[:, part]], 1)
        position = mask.sum(1, keepdim=True) + (shown.cumsum(1) - 1).clamp(min=0)
        whole = torch.cat([mask, shown], 1)
        model(
            input_ids=chunk,
            attention_mask=None if bool(whole.all()) else whole,
            position_ids=position,
            **as_argument(cache),
            use_cache=True,
            logits_to_keep=1,
        )
