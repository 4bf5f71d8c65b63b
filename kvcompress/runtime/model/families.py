"""Which models the runtime computes exactly, and why it refuses the others."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Final

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import LayerKind, ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_FOREIGN: Final = (
    "_name_or_path architectures attn_implementation dtype id2label kvcompress label2id "
    "quantization_config torch_dtype transformers_version use_cache"
).split()
# the kind of a model's layer, by the class that transformers' own cache has for it
_KIND_OF: Final[dict[str, LayerKind]] = {
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "linear",
    "DummyLayer": "none",
}


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
    value_dim = None
    kinds, windows = _layers(text, layers)
    sources = _kv_sources(text, layers)
    kinds = ["shared" if source != layer else kinds[layer] for layer, source in enumerate(sources)]
    latent = getattr(text, "kv_lora_rank", None)
    if latent is not None:
        kinds = ["latent" if kind == "full" else kind for kind in kinds]
        kv_heads, head_dim, value_dim = 1, latent, text.qk_rope_head_dim
    plain = set(kinds) <= {"full", "sliding"}
    return ModelShape(
        model_type=text.model_type,
        config_hash=config_hash(config),
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        sliding_windows=tuple(windows),
        layer_kinds=() if plain else tuple(kinds),
        kv_sources=tuple(sources) if sources != list(range(layers)) else (),
        model_dtype_bytes=2 if dtype is None else dtype.itemsize,
        max_position=getattr(text, "max_position_embeddings", None) or 2048,
    )


def difference(planned: ModelShape, found: ModelShape) -> str | None:
    """The first fact by which a plan's model is another than the one at hand; None: the same."""
    names = ("config_hash", "layers", "kv_heads", "head_dim", "value_dim", "sliding_windows")
    for name in (*names, "layer_kinds", "kv_sources"):
        if getattr(planned, name) != getattr(found, name):
            return name
    return None


def _layers(text: PretrainedConfig, layers: int) -> tuple[list[LayerKind], list[int | None]]:
    """Kind and window of each layer, as transformers' own cache sees them."""
    from transformers import DynamicCache

    own = DynamicCache(config=text).layers
    types = list(getattr(text, "layer_types", None) or [])
    kinds: list[LayerKind] = []
    windows: list[int | None] = []
    for index in range(layers):
        if index >= len(own):  # transformers before 5.18 has no entry where a layer stores nothing
            name, window = ("DynamicLayer" if not own else "DummyLayer"), None
        else:
            name, window = type(own[index]).__name__, getattr(own[index], "sliding_window", None)
        declared = types[index] if index < len(types) else None
        if name not in _KIND_OF:
            raise UnsupportedModelError(
                f"{text.model_type}: layer {index} is {declared or name}, whose cache is not plain "
                "keys and values; evicting from it would change which tokens it selects"
            )
        kind = "none" if declared in ("mlp", "moe") else _KIND_OF[name]
        chunked = declared == "chunked_attention" or (
            declared is None and kind == "sliding" and getattr(text, "sliding_window", None) is None
        )
        kinds.append("chunked" if kind == "sliding" and chunked else kind)
        windows.append(window)
    return kinds, windows


def _kv_sources(text: PretrainedConfig, layers: int) -> list[int]:
    """Per layer the layer whose keys it attends over: its own, or the last of its type before
    the layers that share (Gemma 3n, arXiv 2405.12981)."""
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    types = list(getattr(text, "layer_types", None) or ["full_attention"] * layers)
    own = layers - shared
    return [
        layer if layer < own else max(i for i in range(own) if types[i] == types[layer])
        for layer in range(layers)
    ]


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


def refuse_what_cannot_generate(model: PreTrainedModel) -> None:
    """Refuse a model without a language head.

    Raises:
        UnsupportedModelError: naming the model.
    """
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__}: not a causal language model; it cannot generate"
        )
