"""Which models the runtime computes exactly, and why it refuses the others."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_FOREIGN: Final = (
    "_name_or_path architectures attn_implementation dtype id2label kvcompress label2id "
    "quantization_config torch_dtype transformers_version use_cache"
).split()
_PLAIN_LAYERS: Final = {"full_attention", "sliding_attention"}


def config_hash(config: PretrainedConfig) -> str:
    """sha256 over the settings that define the architecture, the same before and after a save."""
    data = config.get_text_config(decoder=True).to_diff_dict()
    kept = {k: v for k, v in sorted(data.items()) if k not in _FOREIGN and not k.startswith("_")}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def shape_of(config: PretrainedConfig, dtype: torch.dtype | None = None) -> ModelShape:
    """The facts of a model that a plan depends on.

    Raises:
        UnsupportedModelError: where the configuration alone shows that the runtime cannot serve it.
    """
    text = config.get_text_config(decoder=True)
    _refuse_by_config(config, text)
    layers: int = text.num_hidden_layers
    query_heads: int = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    return ModelShape(
        model_type=text.model_type,
        config_hash=config_hash(config),
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        sliding_windows=tuple(_sliding_windows(config, layers)),
        model_dtype_bytes=2 if dtype is None else dtype.itemsize,
        max_position=getattr(text, "max_position_embeddings", None) or 2048,
    )


def _sliding_windows(config: PretrainedConfig, layers: int) -> list[int | None]:
    """The window of each layer as transformers' own cache sees it."""
    from transformers import DynamicCache

    own = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in own[:layers]]
    return windows if len(windows) == layers else [None] * layers


def _refuse_by_config(config: PretrainedConfig, text: PretrainedConfig) -> None:
    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{text.model_type}: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        refuse(
            "an encoder-decoder model has a second, cross-attention cache; use a decoder-only model"
        )
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if getattr(text, name, None) is None:
            refuse(f"the configuration has no {name}; only attention decoders can be compressed")
    if getattr(text, "kv_lora_rank", None) is not None:
        refuse("it caches MLA latents, not keys and values; latent storage is not built yet")
    if getattr(text, "num_kv_shared_layers", 0):
        refuse("layers share one cache entry; shared storage is not built yet")
    kinds = set(getattr(text, "layer_types", None) or ()) - _PLAIN_LAYERS
    if kinds:
        refuse(f"layers of type {', '.join(sorted(kinds))} are not plain attention; not built yet")


def check(model: PreTrainedModel) -> None:
    """Refuse a model that the runtime would serve wrongly.

    Raises:
        UnsupportedModelError: naming the model and the reason.
    """
    shape_of(model.config)
    name = type(model).__name__
    if not model.can_generate():
        raise UnsupportedModelError(f"{name}: not a causal language model; it cannot generate")
    if not _uses_attention_interface(model):
        raise UnsupportedModelError(
            f"{name}: its attention bypasses transformers' attention interface, so the compressed "
            "cache would never be read and the output would be wrong"
        )
    unknown = [n for n, _ in model.named_parameters() if n.endswith(".sinks")]
    if unknown:
        raise UnsupportedModelError(f"{name}: learned attention sinks are not built yet")


def _uses_attention_interface(model: Any) -> bool:
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    return bool(can_set()) if can_set is not None else False
