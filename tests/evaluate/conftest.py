"""Ordinary text, and models whose answers are known in advance."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, PreTrainedTokenizerFast

from kvcompress.runtime.names import CACHE


@pytest.fixture(scope="session")
def filler() -> str:
    """Lines of made-up words that share nothing with the task words."""
    rng = random.Random(1)
    words = ["".join(rng.choices("bcdfghjkl", k=rng.randint(2, 8))) for _ in range(900)]
    return "".join(f"{' '.join(words[i : i + 9])}\n" for i in range(0, len(words), 9))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, filler: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(filler, encoding="utf-8")
    return path


class SecondReading(nn.Module):
    """Looks the asked key up in the text so far, of which it sees the last `memory` characters.

    The text lies in the cache in place of keys, so it is copied and selected with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, memory: int) -> None:
        super().__init__()
        self.tokenizer, self.memory = tokenizer, memory
        self.config = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=2
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> SimpleNamespace:
        batch, length = input_ids.shape
        cache: Cache = kwargs[CACHE]
        seen = cache.get_seq_length()
        new = input_ids.float().reshape(batch, 1, length, 1)
        history = cache.update(new, new, 0)[0][:, 0, :, 0].long()
        mask = torch.ones_like(history) if attention_mask is None else attention_mask
        assert torch.equal(position_ids[:, -1], mask.sum(-1) - 1)
        kept = range(length - logits_to_keep if logits_to_keep else 0, length)
        logits = torch.zeros(batch, len(kept), len(self.tokenizer))
        for b in range(batch):
            for i, place in enumerate(kept):
                ids = history[b, : seen + place + 1][mask[b, : seen + place + 1].bool()]
                logits[b, i, self._next(ids)] = 1.0
        return SimpleNamespace(logits=logits)

    def _next(self, ids: Tensor) -> int:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        _, found, asked = text.rpartition("Ask: ")
        place = text[-self.memory :].find(f"Note: {asked}") if found else -1
        if place < 0:
            return self.tokenizer.encode("!", add_special_tokens=False)[0]
        following = text[-self.memory :][place + len(f"Note: {asked}")]
        return self.tokenizer.encode(following, add_special_tokens=False)[0]


@pytest.fixture
def reader(tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """Makes a `Reader` with so much memory."""
    return lambda memory: SecondReading(tiny_tokenizer, memory)
