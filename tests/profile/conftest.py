"""Tiny models of several families, from configurations."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


_QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight", "query_key_value.weight")


def config_of(family):
    shared = {**SIZES, "num_key_value_heads": 2}
    if family == "llama":
        return LlamaConfig(**shared)
    if family == "mistral":
        return MistralConfig(**shared, sliding_window=40)
    if family == "gemma2":
        return Gemma2Config(
            **shared,
            head_dim=16,
            sliding_window=40,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=16,
        )
    if family == "gpt_neox":
        return GPTNeoXConfig(**SIZES)
    if family == "opt":
        renamed = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
        return OPTConfig(**renamed, ffn_dim=96, word_embed_proj_dim=64)
    return GPT2Config(
        vocab_size=260,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=1,
    )


def model_of(family, hot=4.0):
    """Random weights; queries `hot` times larger than usual, so that attention is not uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_QUERIES_AND_KEYS):
                parameter.mul_(hot)
    return model


@pytest.fixture(scope="session")
def llama():
    return model_of("llama")


@pytest.fixture(scope="session")
def prompt():
    return torch.randint(3, 259, (300,), generator=torch.Generator().manual_seed(1)).tolist()
