"""The loss of each weight format in each decoder layer.

The profiler rounds the linear layers of one decoder layer to a format, leaves all other layers as
they are, and takes the KL of the held-out rows' predictions to those of the unrounded model. Only
weights are rounded: int8 kernels round activations too and lose a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from kvcompress.plan import ROUNDED, WHOLE, WeightScheme
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.hf import decoder_layers
from kvcompress.profile.store import LayerWeights
from kvcompress.quant.weights import FORMATS
from kvcompress.quant.weights.base import linear_layers, output_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_PROMPTS: Final = 4  # each layer and format takes a forward of each of these prompts


def layer_modules(model: PreTrainedModel, layers: int) -> list[dict[str, nn.Module]]:
    """The linear layers of each decoder layer by their full names; none where all are quantized."""
    linear, heads = linear_layers(model), set(output_heads(model))
    found: list[dict[str, nn.Module]] = []
    for layer in decoder_layers(model, layers):
        inside = set(map(id, layer.modules()))
        found.append(
            {
                name: module
                for name, module in model.named_modules()
                if name in linear and name not in heads and id(module) in inside
            }
        )
    return found


def weight_sizes(modules: dict[str, nn.Module]) -> dict[WeightScheme, int]:
    """Bytes of these linear layers in each format; a layer that does not fit stays in 16 bits."""
    biases = [getattr(module, "bias", None) for module in modules.values()]
    rest = sum(2 * bias.numel() for bias in biases if bias is not None)
    sizes = [_size(module) for module in modules.values()]
    return {f.name: rest + sum(f.stored_bytes(*size) for size in sizes) for f in FORMATS.values()}


def measure_weights(
    model: PreTrainedModel,
    layers: int,
    prompts: list[list[int]],
    step: Callable[[int], None] = lambda count: None,
) -> tuple[LayerWeights, ...]:
    """Bytes and KL of every decoder layer in every format, over the first prompts.

    Args:
        step: told how many more forwards are done.
    """
    found = layer_modules(model, layers)
    if not all(found):
        return ()
    chosen = prompts[:WEIGHT_PROMPTS]
    exact = [_predict(model, ids) for ids in chosen]
    step(len(chosen))
    result = []
    for modules in found:
        nats: dict[WeightScheme, float] = {WHOLE: 0.0}
        for scheme in ROUNDED:
            with rounded(modules, scheme):
                lost = [
                    _mean_kl(full, _predict(model, ids))
                    for full, ids in zip(exact, chosen, strict=True)
                ]
            nats[scheme] = float(f"{max(0.0, sum(lost) / len(lost)):.6g}")
            step(len(chosen))
        # a format with more bits may always stand in for one with fewer
        bits = {scheme: FORMATS[scheme].linear_bits for scheme in ROUNDED}
        nats |= {s: min(nats[o] for o in ROUNDED if bits[o] <= bits[s]) for s in ROUNDED}
        result.append(
            LayerWeights(modules=tuple(modules), size_bytes=weight_sizes(modules), nats=nats)
        )
    return tuple(result)


@contextmanager
def rounded(modules: dict[str, nn.Module], scheme: WeightScheme) -> Iterator[None]:
    """Within the block the layers hold the values that they would read back from `scheme`."""
    weight_format = FORMATS[scheme]
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for module in modules.values():
            if not weight_format.fits(*_size(module)):
                continue
            weight: Tensor = module.weight.data  # type: ignore[assignment]
            rows = weight if isinstance(module, nn.Linear) else weight.T  # Conv1D: [in, out]
            before.append((weight, weight.clone()))
            rows.copy_(weight_format.roundtrip(rows.float()))
        yield
    finally:
        for weight, exact in before:
            weight.copy_(exact)


def _size(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)"""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


@torch.no_grad()
def _predict(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probabilities ``[W, vocabulary]`` of the held-out rows."""
    tokens = torch.tensor([ids], device=model.device)
    rows = held_out_rows(len(ids))
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits
    return logits[0, -rows:].float().log_softmax(-1)


def _mean_kl(full: Tensor, other: Tensor) -> float:
    return float((full.exp() * (full - other)).sum(-1).double().mean())
