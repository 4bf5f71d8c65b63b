"""What weight formats cost, decoder layer by decoder layer.

The linear layers of one decoder layer are replaced by what they read as in a format, every other
layer stays as it is, and the KL of the predictions of the held-out rows is taken to the model as it
is. Rounding is simulated on the weights: int8 kernels, which round activations too, lose a little
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from kvcompress.plan import ROUNDED, WHOLE, WeightScheme
from kvcompress.profile.hf import decoder_layers
from kvcompress.profile.rows import held_out_rows
from kvcompress.profile.store import LayerWeights
from kvcompress.quant.weights import FORMATS
from kvcompress.quant.weights.base import linear_layers, output_heads

WEIGHT_PROMPTS: Final = 4  # each layer and format costs a forward of each


def layer_modules(model: Any, layers: int) -> list[dict[str, nn.Module]]:
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
    sizes: dict[WeightScheme, int] = {}
    for weight_format in FORMATS.values():
        total = 0
        for module in modules.values():
            out_features, in_features = _size(module)
            fits = weight_format.fits(out_features, in_features)
            used = weight_format if fits else FORMATS[WHOLE]
            total += used.linear_bytes(out_features, in_features)
            bias = getattr(module, "bias", None)
            total += 0 if bias is None else 2 * bias.numel()
        sizes[weight_format.name] = total
    return sizes


def measure_weights(
    model: Any,
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
def _predict(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities ``[W, vocabulary]`` of the held-out rows."""
    tokens = torch.tensor([ids], device=model.device)
    rows = held_out_rows(len(ids))
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits
    return logits[0, -rows:].float().log_softmax(-1)


def _mean_kl(full: Tensor, other: Tensor) -> float:
    return float((full.exp() * (full - other)).sum(-1).double().mean())
