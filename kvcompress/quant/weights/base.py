"""The interface of a weight format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from kvcompress.recipe import WeightScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITSANDBYTES: Final = ("bitsandbytes>=0.46.1", "accelerate>=1.1")
FLOATS: Final = frozenset(("BF16", "F16", "F32"))
PACKED: Final = FLOATS | {"I8", "U8"}


@dataclass(frozen=True)
class WeightFormat:
    """One way to store the weights of a bundle.

    Attributes:
        linear_bits: bits of one weight of a linear layer on disk, block scales included.
        needs: packages that loading asks for, as requirement strings.
        load_kwargs: keyword arguments of `from_pretrained` that quantize while loading, given the
            names of the modules that stay as they are.
        fits: whether a linear layer with (out_features, in_features) can run in this format on
            every device.
        linear_bytes: bytes of the weight of a linear layer with (out_features, in_features),
            scales and tables included, labels of the format aside.
        roundtrip: the value that a float32 weight ``[out, in]`` has once it was stored and read.
        dtypes: dtypes that tensors of its files may have, by safetensors' names.
        matches: whether the `quantization_config` of a config.json describes this format.
    """

    name: WeightScheme
    linear_bits: float
    needs: tuple[str, ...]
    load_kwargs: Callable[[Sequence[str]], dict[str, object]]
    fits: Callable[[int, int], bool]
    matches: Callable[[object], bool]
    linear_bytes: Callable[[int, int], int]
    roundtrip: Callable[[Tensor], Tensor]
    dtypes: frozenset[str]

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a linear layer's weight in a bundle; one that does not fit stays in 16 bits."""
        if self.fits(out_features, in_features):
            return self.linear_bytes(out_features, in_features)
        return 2 * out_features * in_features


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer by its name; meta tensors are enough."""
    from transformers.pytorch_utils import Conv1D

    sizes = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            sizes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            sizes[name] = (out_features, in_features)
    return sizes


def misfits(model: PreTrainedModel, weight_format: WeightFormat) -> tuple[str, ...]:
    """Names of the linear layers whose sizes the format cannot run, the output head apart."""
    heads = set(output_heads(model))
    return tuple(
        name
        for name, (out_features, in_features) in linear_layers(model).items()
        if name not in heads and not weight_format.fits(out_features, in_features)
    )


def output_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers that produce logits: few weights, and rounding them costs the most."""
    head = model.get_output_embeddings()
    return tuple(name for name, module in model.named_modules() if module is head)


def weights_bytes(model: PreTrainedModel, weight_format: WeightFormat, kept: Sequence[str]) -> int:
    """Bytes of the weights in this format, `kept` layers in 16 bits; within a few percent."""
    rounded = sum(
        out_features * in_features
        for name, (out_features, in_features) in linear_layers(model).items()
        if name not in kept
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    return round(rounded * weight_format.linear_bits / 8) + 2 * (total - rounded)
