"""The profiler's seam to transformers: its only file that touches private names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import UnsupportedModelError

NAME: Final = "kvcompress_profile"
# (attention module, query [Hq, T, D], key [Hkv, T, D], value, scaling, softcap) -> [Hq, T, D]
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, float, float | None], Tensor]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Prompts run alone and unpadded: causality and windows follow from the positions."""


@contextmanager
def attention_through(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let the model's layers call `attend` for batches of one, until the block is left."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(f"{type(module).__name__}: {name} is not built yet")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(module, query[0], key[0], value[0], scaling, softcap)
        return out.to(query.dtype).transpose(0, 1).unsqueeze(0).contiguous(), None

    before = model.config._attn_implementation or "sdpa"
    # transformers offers no way to unregister, so a name is registered once and what it calls is
    # set, and taken away again, on the interface's own mapping
    AttentionInterface.register(NAME, _outside)
    AttentionMaskInterface.register(NAME, _no_mask)
    ALL_ATTENTION_FUNCTIONS[NAME] = forward
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def _outside(*args: Any, **kwargs: Any) -> None:
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
