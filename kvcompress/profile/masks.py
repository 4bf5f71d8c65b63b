"""The tokens that a keep-set holds at each held-out row, as the runtime would hold them there.

The prompt proper ends where the held-out rows begin, and budgets resolve against its length. From
row to row the recent and local windows slide. `frequent` is chosen anew before every eighth row, by
ranks that know only earlier rows, among tokens that were not dropped before. A token that leaves
its window between two choices is left out until the next choice.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kvcompress.plan import HeadPlan
from kvcompress.profile.collect import BLOCK_ROWS, LayerRows
from kvcompress.recipe import Keep


class KeepMasks:
    """The keep rule on one layer and prompt.

    Attributes:
        visible: ``[W, S]`` bool, what the architecture lets each row see.
        exact: ``[W, S]`` bool, sinks and recent tokens, which every keep-set holds uncoded.
    """

    def __init__(self, rows: LayerRows, keep: Keep, special: Tensor, punct: Tensor) -> None:
        """For token classes `special` and `punct`, ``[S]`` bool."""
        self.rows, self.keep = rows, keep
        self.special, self.punct = special, punct
        heads, total, _ = rows.key.shape
        device = rows.key.device
        self.count = total - rows.prompt_tokens
        self.key = torch.arange(total, device=device)
        self.query = torch.arange(rows.prompt_tokens, total, device=device)[:, None]
        self.visible = rows.softmax.visible(rows.prompt_tokens, self.count, total, device)
        # an architecture's own window lets the first tokens go
        self.sinks = 0 if rows.softmax.window is not None else keep.sink_tokens
        self.sink = self.key < self.sinks
        self.exact = (self.sink | (self.key > self.query - keep.recent_tokens)) & self.visible

    def kept(self, head: HeadPlan) -> Tensor:
        """``[Hkv or 1, W, S]`` bool."""
        if head.full:
            return self.visible[None]
        length = self.rows.prompt_tokens
        local = head.local.resolve(length) if head.local else 0
        classes = self._classes(head)
        kept = (self.exact | classes | (self.key > self.query - local))[None]
        if head.frequent:
            window = max(local, self.keep.recent_tokens)
            kept = kept | self._frequent(head.frequent.resolve(length), window, classes)
        return kept & self.visible

    def _classes(self, head: HeadPlan) -> Tensor:
        none = torch.zeros_like(self.special)
        return (self.special if head.special else none) | (self.punct if head.punct else none)

    def _frequent(self, budget: int, window: int, classes: Tensor) -> Tensor:
        """``[Hkv, W, S]``: the best `budget` tokens outside of the newest `window`."""
        alive = ~(classes | self.sink)
        chosen = []
        for block, order in enumerate(self._orders):
            newest = self.rows.prompt_tokens + block * BLOCK_ROWS - 1
            eligible = alive & (self.key <= newest - window)
            if self.rows.softmax.window is not None:
                eligible = eligible & (self.key > newest - self.rows.softmax.window)
            ranked = eligible.expand_as(order).gather(1, order)
            best = ranked & (ranked.cumsum(-1) <= budget)
            best = torch.zeros_like(best).scatter_(1, order, best)
            alive = alive & (best | ~eligible)
            chosen.append(best)
        blocks = torch.stack(chosen, dim=1)
        return blocks.repeat_interleave(BLOCK_ROWS, dim=1)[:, : self.count]

    @cached_property
    def _orders(self) -> list[Tensor]:
        """``[Hkv, S]`` tokens of each block of rows, those of largest rank first."""
        return [rank.argsort(dim=-1, descending=True, stable=True) for rank in self.rows.ranks]
