"""Tiny models of several families, from configurations, with weights scaled so errors show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB: Final = 97
_GQA: Final = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

CONFIGS: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "llama": lambda: LlamaConfig(**_GQA),
    "llama_mha": lambda: LlamaConfig(**{**_GQA, "num_key_value_heads": 4}),
    "qwen3": lambda: Qwen3Config(**_GQA),
    "mistral": lambda: MistralConfig(**_GQA, sliding_window=24),
    "gemma2": lambda: Gemma2Config(
        **_GQA, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=20.0
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
}

SUPPORTED: Final = tuple(CONFIGS)


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """float32, eager attention, weights sharpened so that attention is far from uniform."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("layers" in name):
                parameter.mul_(4.0)
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.generation_config.pad_token_id = 2
    return model


def falcon() -> PreTrainedModel:
    """A model whose attention bypasses the attention interface."""
    config = FalconConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config)


def prompts(batch: int, length: int, pads: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Random ids, none twice in a row (equal keys tie); row b starts with ``pads[b]`` pads."""
    generator = torch.Generator().manual_seed(1)
    order = [torch.randperm(VOCAB - 3, generator=generator) + 3 for _ in range(batch)]
    ids = torch.stack(order)[:, :length]
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads or [0] * batch):
        ids[row, :count] = 2
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}
