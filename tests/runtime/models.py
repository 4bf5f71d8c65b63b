"""Tiny models of many families, from configurations, with weights scaled so that errors show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPTJForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB: Final = 97
PAD: Final = 2
WINDOW: Final = 24
BLOCK: Final = 16

_IDS: Final = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,  # a tied model says the same token again and again
}
_MHA: Final[dict[str, Any]] = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GQA: Final = {**_MHA, "num_key_value_heads": 2}
_GQA_16: Final = {**_GQA, "head_dim": 16}
_FOUR_LAYERS: Final = {"num_hidden_layers": 4}
_ALTERNATING: Final = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT: Final = {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_LATENT: Final = {
    **_MHA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_INDEXED: Final = {
    **_LATENT,
    "q_lora_rank": 24,
    "n_group": 2,
    "topk_group": 1,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 2,
}


def _config(model_type: str, *parts: dict[str, Any], **more: Any) -> PretrainedConfig:
    settings: dict[str, Any] = {}
    for part in (*parts, more):
        settings.update(part)
    return AutoConfig.for_model(model_type, **settings)


CONFIGS: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "llama": lambda: _config("llama", _GQA_16),
    "llama_mha": lambda: _config("llama", _GQA_16, num_key_value_heads=4),
    "llama4": lambda: _config(
        "llama4_text",
        _GQA_16,
        _FOUR_LAYERS,
        _LOCAL_EXPERTS,
        intermediate_size_mlp=96,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=BLOCK,
        no_rope_layer_interval=2,
        floor_scale=16,  # so that the temperature moves within a short prompt
    ),
    "qwen2": lambda: _config("qwen2", _GQA),
    "qwen3": lambda: _config("qwen3", _GQA_16),
    "qwen3_moe": lambda: _config("qwen3_moe", _GQA_16, _EXPERTS),
    "qwen3_next": lambda: _config(
        "qwen3_next",
        _GQA_16,
        _FOUR_LAYERS,
        _EXPERTS,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=48,
    ),
    "mistral": lambda: _config("mistral", _GQA_16, sliding_window=WINDOW),
    "mixtral": lambda: _config("mixtral", _GQA_16, _LOCAL_EXPERTS),
    "gemma2": lambda: _config(
        "gemma2",
        _GQA_16,
        _ALTERNATING,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
    ),
    "gemma3": lambda: _config("gemma3_text", _GQA_16, _ALTERNATING, query_pre_attn_scalar=16),
    "gemma3n": lambda: _config(
        "gemma3n_text",
        _GQA_16,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        sliding_window=WINDOW,
        intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=8,
    ),
    "phi": lambda: _config("phi", _GQA),
    "phi3": lambda: _config("phi3", _GQA),
    "opt": lambda: _config("opt", _MHA, ffn_dim=96, word_embed_proj_dim=64),
    "gpt2": lambda: _config("gpt2", _GPT),
    "gpt_neox": lambda: _config("gpt_neox", _MHA),
    "starcoder2": lambda: _config("starcoder2", _GQA),
    "stablelm": lambda: _config("stablelm", _GQA),
    "olmo2": lambda: _config("olmo2", _GQA),
    "cohere2": lambda: _config("cohere2", _GQA_16, _ALTERNATING, logit_scale=1.0),
    "gpt_oss": lambda: _config(
        "gpt_oss",
        _GQA_16,
        _ALTERNATING,
        _LOCAL_EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v2": lambda: _config(
        "deepseek_v2", _LATENT, q_lora_rank=None, n_group=1, topk_group=1
    ),
    "deepseek_v3": lambda: _config("deepseek_v3", _LATENT, q_lora_rank=24, n_group=2, topk_group=1),
    "granite": lambda: _config(
        "granite", _GQA, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0
    ),
    "smollm3": lambda: _config("smollm3", _GQA, no_rope_layer_interval=2),
    "glm": lambda: _config("glm", _GQA_16),
    "glm4": lambda: _config("glm4", _GQA_16),
}

# one of each mechanism that needs nothing beside full and sliding layers
SUPPORTED: Final = ("llama", "llama_mha", "qwen3", "mistral", "gemma2", "opt", "gpt_neox")

# models that must be refused
REFUSED: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "falcon": lambda: _config("falcon", _MHA, num_kv_heads=4),
    "bloom": lambda: _config("bloom", _IDS, hidden_size=64, n_layer=2, n_head=4),
    "jetmoe": lambda: _config("jetmoe", _GQA, _LOCAL_EXPERTS, kv_channels=16),
    "diffllama": lambda: _config("diffllama", _GQA),
    "deepseek_v32": lambda: _config("deepseek_v32", _INDEXED),
    "glm_moe_dsa": lambda: _config("glm_moe_dsa", _INDEXED),
    "t5": lambda: _config(
        "t5",
        _IDS,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
}
# the attention of GPT-J can be replaced since transformers 5.24
_GPTJ_IS_SERVED: Final = GPTJForCausalLM._can_set_attn_implementation()
(CONFIGS if _GPTJ_IS_SERVED else REFUSED)["gptj"] = lambda: _config("gptj", _GPT, rotary_dim=8)
FAMILIES: Final = tuple(CONFIGS)


def build(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Eager attention, weights sharpened so that attention is far from uniform.

    Args:
        changes: settings of the configuration, where it has them.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in changes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        _sharpen(model)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def _sharpen(model: PreTrainedModel) -> None:
    """Attention logits of standard deviation 2 to 3, model logits of 0.6, sinks and biases that
    count.

    Configurations start every matrix at 0.02: ten times that turns a unit input of 64 channels
    into an output near 1.6.
    """
    norm = -0.2 if model.config.model_type == "gemma3n_text" else 0.5  # Gemma 3n has no 1/√D
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            parameter.normal_(std=0.3)
        elif parameter.ndim >= 2:
            parameter.mul_(5.0 if "linear_attn" in name else 10.0)
        if name.endswith("sinks"):
            parameter.add_(1.0)
        if "q_norm" in name or "k_norm" in name:
            parameter.add_(norm)
    model.get_output_embeddings().weight.mul_(0.4)


def refused(name: str) -> PreTrainedModel:
    """A model of `REFUSED`."""
    torch.manual_seed(0)
    config = REFUSED[name]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def falcon() -> PreTrainedModel:
    """A model whose attention bypasses the attention interface."""
    return refused("falcon")


def prompts(batch: int, length: int, pads: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Random ids, none twice in a row (equal keys tie); row b starts with ``pads[b]`` pads."""
    generator = torch.Generator().manual_seed(1)
    order = [torch.randperm(VOCAB - 3, generator=generator) + 3 for _ in range(batch)]
    ids = torch.stack(order)[:, :length]
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads or [0] * batch):
        ids[row, :count] = PAD
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}
