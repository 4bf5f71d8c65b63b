"""The profiler's seam to transformers: its only file that touches private names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import UnsupportedModelError
from kvcompress.plan import ModelShape

NAME: Final = "kvcompress_profile"


@dataclass(frozen=True, slots=True)
class Softmax:
    """How a layer turns queries and keys into attention.

    Attributes:
        window: newest keys that a query sees, itself included; None is all of them.
    """

    scaling: float
    softcap: float | None
    window: int | None

    def visible(self, first_row: int, rows: int, keys: int, device: torch.device) -> Tensor:
        """``[rows, keys]`` bool."""
        q = torch.arange(first_row, first_row + rows, device=device)[:, None]
        k = torch.arange(keys, device=device)[None, :]
        seen = k <= q
        return seen if self.window is None else seen & (k > q - self.window)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Unmasked ``[Hkv, G, T, S]`` from ``[Hkv, G, T, D]`` and ``[Hkv, S, D]``, float32."""
        flat = query.flatten(1, 2) @ key.mT * self.scaling
        if self.softcap is not None:
            flat = torch.tanh(flat / self.softcap) * self.softcap
        return flat.unflatten(1, query.shape[1:3])


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a layer gives its attention function for one unpadded prompt, all of it float32.

    Attributes:
        module: the attention module.
        query: ``[Hkv, G, T, D]``: grouped by KV head, so that keys are never repeated.
        key, value: ``[Hkv, S, D]``.
    """

    layer: int
    module: nn.Module
    softmax: Softmax
    query: Tensor
    key: Tensor
    value: Tensor


def _no_mask(*args: object, **kwargs: object) -> None:
    """Prompts run alone and unpadded: causality and windows follow from the positions."""


@contextmanager
def attention_through(
    model: PreTrainedModel, shape: ModelShape, attend: Callable[[LayerInput], Tensor]
) -> Iterator[None]:
    """Within the block, the model's layers get their attention from `attend`.

    Args:
        attend: is given one prompt at a time and returns ``[Hkv, G, T, Dv]``.
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(f"{type(module).__name__}: {name} is not built yet")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        softmax = Softmax(scaling, softcap, shape.sliding_windows[layer])
        grouped = query[0].float().unflatten(0, (key.shape[1], -1))
        given = LayerInput(layer, module, softmax, grouped, key[0].float(), value[0].float())
        out = attend(given).flatten(0, 1)
        return out.to(query.dtype).transpose(0, 1).unsqueeze(0).contiguous(), None

    before = model.config._attn_implementation or "sdpa"
    # transformers cannot unregister a name. So the name is registered once, and the function behind
    # it is set and taken away again on the interface's own mapping.
    AttentionInterface.register(NAME, _outside)
    AttentionMaskInterface.register(NAME, _no_mask)
    ALL_ATTENTION_FUNCTIONS[NAME] = forward
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def _outside(*args: object, **kwargs: object) -> None:
    raise RuntimeError("the profiler's attention function was called outside of the profiler")


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module]:
    """The decoder's layers in order.

    Raises:
        UnsupportedModelError: if no list of `layers` modules holds the attention.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            if all(any(hasattr(m, "layer_idx") for m in layer.modules()) for layer in module):
                return list(module)
    raise UnsupportedModelError(f"{type(model).__name__}: cannot find its {layers} decoder layers")
