"""Loading the model and tokenizer that a profile is taken of."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from kvcompress.checkpoint import load as checkpoint
from kvcompress.checkpoint.compute import Dtype, computing_in, stored_dtype
from kvcompress.checkpoint.load import Checkpoint, build, find, load_config, load_tokenizer
from kvcompress.errors import CalibrationError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SAMPLED: Final = 1024  # elements of each tensor that enter `weights_hash`


def load_source(
    model: str, device: str = "auto", dtype: Dtype = "stored"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a directory or a hub name.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``, which takes CUDA where there is one.
        dtype: to compute in; ``auto`` is float32 where the device multiplies the stored one slower.
            The plan of such a model is still that of the checkpoint: give `shape_of` the
            `stored_dtype`.

    Raises:
        UnsupportedModelError: if there is no such model, or it is not a causal language model.
    """
    found, config = _causal(model)  # refuses before anything big is read
    tokenizer = load_tokenizer(found)
    return _loaded(found, config, device, dtype), tokenizer


def load_model(model: str, device: str = "auto", dtype: Dtype = "stored") -> PreTrainedModel:
    """As `load_source`, without a tokenizer."""
    return _loaded(*_causal(model), device, dtype)


def _loaded(
    found: Checkpoint, config: PretrainedConfig, device: str, dtype: Dtype
) -> PreTrainedModel:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = checkpoint.load_model(found, config, device_map=device)
    ready: PreTrainedModel = computing_in(loaded, dtype, found.name)
    return ready


def random_model(model: str, layers: int | None = None) -> Any:
    """The architecture of a model with made-up float32 weights, for questions of mechanics.

    Args:
        layers: only the first so many layers; None is all of them.

    Raises:
        UnsupportedModelError: as `load_source`.
    """
    import torch

    found, config = _causal(model)
    text = config.get_text_config(decoder=True)
    if layers is not None:
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    torch.manual_seed(0)
    return build(found, config, dtype=torch.float32).eval()


def _causal(model: str) -> tuple[Checkpoint, PretrainedConfig]:
    found = find(model)
    config = load_config(found)
    _refuse_unless_causal(model, config)
    return found, config


def _refuse_unless_causal(model: str, config: PretrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{model}: {kind} is an encoder-decoder model; give a decoder-only language model"
        )
    saved = config.architectures or []
    causal = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", None)
    if causal is None or (saved and causal not in saved):
        raise UnsupportedModelError(
            f"{model}: {', '.join(saved) or kind} is not a causal language model; give one that "
            "generates text"
        )


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Refuse a tokenizer of another model before an index error does.

    Raises:
        CalibrationError: if a prompt has a token that the model does not embed.
    """
    weight = model.get_input_embeddings().weight
    size = weight.shape[0]  # type: ignore[index]
    largest = max(map(max, prompts))
    if largest >= size:
        raise CalibrationError(
            f"the tokenizer has token {largest}, the model embeds {size}: it is another model's; "
            "give the tokenizer that came with the model"
        )


def weights_hash(model: nn.Module) -> str:
    """sha256 over a sample of every parameter: tells a retrained model from the profiled one.

    Weights that were only converted to the dtype that the model computes in are the same weights.
    """
    digest = hashlib.sha256()
    stored = stored_dtype(model)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
        converted = parameter.is_floating_point() and bool((sample.to(stored) == sample).all())
        dtype = stored if converted else parameter.dtype
        digest.update(f"{name} {tuple(parameter.shape)} {dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights in each scheme: linear layers that fit it in it, the rest in bf16."""
    from kvcompress.quant.weights import FORMATS
    from kvcompress.quant.weights.base import linear_layers, output_heads

    heads = set(output_heads(model))
    sizes = [size for name, size in linear_layers(model).items() if name not in heads]
    rest = 2 * (sum(p.numel() for p in model.parameters()) - sum(o * i for o, i in sizes))
    return {name: rest + sum(f.stored_bytes(*s) for s in sizes) for name, f in FORMATS.items()}
