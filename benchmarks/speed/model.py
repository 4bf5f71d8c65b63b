"""The Llama-shaped model of 222 million parameters that the speed benchmarks run, random weights.

Speed does not depend on what the weights say; quality does, and comes from the shipped model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITION: Final = 2**20
NAMES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INT8: Final = "int8"
COMPILED: Final = "compiled bfloat16"  # products of the compiled kernels, as bundles have them


def config(scale: str = "full") -> LlamaConfig:
    """``full`` is the model of the results, ``tiny`` of the smoke tests."""
    sizes = {
        "full": (32000, 1024, 2816, 16, 16, 8),
        "tiny": (256, 128, 192, 2, 4, 2),
    }
    vocabulary, hidden, inner, layers, heads, kv_heads = sizes[scale]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def words(scale: str) -> str:
    """The model in one line, for conditions."""
    made = config(scale)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(made).parameters())
    return (
        f"Llama-shaped, {parameters / 1e6:.3g} M parameters with random weights: hidden "
        f"{made.hidden_size}, {made.num_hidden_layers} layers, {made.num_attention_heads} query on "
        f"{made.num_key_value_heads} KV heads of {made.head_dim}, MLP {made.intermediate_size}, "
        f"vocabulary {made.vocab_size}, tied"
    )


class Models:
    """The model in each format of weights, made when first asked for."""

    def __init__(self, scale: str = "full") -> None:
        self.scale = scale
        self._made: dict[str, Any] = {}

    def __call__(self, weights: str) -> Any:
        """The model with weights in ``float32``, ``bfloat16``, `COMPILED` or `INT8`."""
        if weights not in self._made:
            self._made[weights] = self._make(weights)
        return self._made[weights]

    def _make(self, weights: str) -> Any:
        if weights == "float32":
            torch.manual_seed(0)
            return LlamaForCausalLM(config(self.scale)).eval()
        if weights == INT8:
            from kvcompress.kernels.linear.int8 import (
                quantize_linears,  # not in rivals' environments
            )

            return quantize_linears(copy.deepcopy(self("float32"))).eval()
        if weights == COMPILED:
            from kvcompress.kernels.linear.bits16 import serve_16_bit  # not in rivals' environments

            return serve_16_bit(copy.deepcopy(self("bfloat16")))
        return copy.deepcopy(self("float32")).to(NAMES[weights])

    def saved(self, folder: Path) -> Path:
        """The bfloat16 model as a directory, for processes of other environments."""
        if not (folder / "config.json").is_file():
            self("bfloat16").save_pretrained(folder)
        return folder


def kernels_missing(weights: str) -> str | None:
    """Why a model with such weights cannot be timed, None where it can."""
    if weights not in (INT8, COMPILED):
        return None
    from kvcompress.bench.run import kernel_words  # not there in rivals' environments

    words = kernel_words()
    return None if words.startswith("C") else f"{weights} weights need compiled kernels: {words}"
