"""Tiny models that every transformers builds alike, their inputs, and how they are fed."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "kvcompress" / "demo" / "model"
VOCAB, LAYERS = 512, 4
# the environment of kvpress has no kvcompress to ask for this name
_ASKED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _ASKED else "past_key_values"

_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_NEOX = {k: v for k, v in _PLAIN.items() if k not in ("num_key_value_heads", "head_dim")}
_MIXED = ["sliding_attention", "full_attention"] * 2
_GEMMA = {"sliding_window": 96, "layer_types": _MIXED, "query_pre_attn_scalar": 32}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# configuration class of transformers, and what differs from _PLAIN
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _PLAIN),
    "mistral": ("MistralConfig", {**_PLAIN, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_PLAIN, "use_sliding_window": False}),
    "qwen3": ("Qwen3Config", _PLAIN),
    "phi3": ("Phi3Config", _PLAIN),
    "qwen3_moe": ("Qwen3MoeConfig", {**_PLAIN, **_MOE, "num_experts": 4}),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**_PLAIN, **_GEMMA},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3_text": ("Gemma3TextConfig", {**_PLAIN, **_GEMMA}),
    "gpt_oss": (
        "GptOssConfig",
        {**_PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 96},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{k: v for k, v in _PLAIN.items() if k not in ("head_dim", "num_key_value_heads")},
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
}


def build(family: str = "llama", attention: str = "sdpa") -> Any:
    """float32; every weight is drawn from a seed of its own name, so any transformers agrees."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    attention = "eager" if family == "gpt_oss" else attention  # its sinks have no sdpa
    maker = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    model = maker.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("embed_out", "lm_head").replace("language_model.", "")
            _draw(name, parameter)
    model.float()
    model.generation_config.pad_token_id = 2
    return model


def _draw(name: str, parameter: Tensor) -> None:
    """Queries and keys are sharpened, so that attention is far from uniform."""
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=seed)
    if "q_norm" in name or "k_norm" in name:
        parameter.add_(1.0 + 0.2 * noise)
    elif "norm" in name:
        parameter.add_(0.2 * noise)
    elif parameter.ndim == 1:
        parameter.copy_(noise * (1.0 if "sinks" in name else 0.2))
    elif "embed" in name:
        parameter.copy_(noise)
    else:
        sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "query", "q_b"))
        parameter.copy_(noise * (2.0 if sharp else 1.0) / math.sqrt(parameter.shape[-1]))


def demo_model() -> tuple[Any, Any]:
    """The small trained model of this repository, float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


def demo_ids(tokenizer: Any, length: int) -> Tensor:
    """``[1, length]`` of text that the demo model was not trained on."""
    text = (DEMO_MODEL / "held_out.txt").read_text(encoding="utf-8")
    return tokenizer(text, return_tensors="pt").input_ids[:, :length]


def token_ids(length: int, seed: int = 1, batch: int = 1) -> Tensor:
    """``[batch, length]`` random ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def bounds_of(*lengths: int) -> list[int]:
    """Chunk lengths to the bounds that `feed` takes: ``(4, 1, 1)`` → ``[0, 4, 5, 6]``."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


@torch.no_grad()
def feed(
    model: Any,
    cache: Any,
    ids: Tensor,
    bounds: Sequence[int],
    mask: Tensor | None = None,
    positions: bool = True,
    before: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Logits ``[B, T, vocab]`` of each chunk ``ids[:, bounds[i]:bounds[i + 1]]``.

    Args:
        mask: ``[B, length]``, 0 for left pads; None passes no attention mask at all.
        positions: pass position_ids, as kvpress's own pipeline does by hand.
        before: called with the chunk's number.
    """
    real = torch.ones_like(ids) if mask is None else mask
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    logits = []
    for number, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if before is not None:
            before(number)
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :high]}
        if positions:
            given["position_ids"] = position_ids[:, low:high]
        out = model(input_ids=ids[:, low:high], **{_CACHE: cache}, use_cache=True, **given)
        logits.append(out.logits.float())
    return logits
