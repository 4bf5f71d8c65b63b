"""The loss of each weight format in each decoder layer.

The profiler rounds the linear layers of one decoder layer to a format, leaves all other layers as
they are, and takes the KL of the held-out rows' predictions to those of the unrounded model. Only
weights are rounded: int8 kernels round activations too and lose a little more.

Rounding needs no long context, so the prompts are short. The layers below the rounded one give what
they gave before, so only the layers from there on run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from kvcompress.plan import ROUNDED, WHOLE, WeightScheme
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.hf import decoder_layers
from kvcompress.profile.replay import mean_kl
from kvcompress.profile.store import LayerWeights
from kvcompress.quant.weights import FORMATS
from kvcompress.quant.weights.base import linear_layers, output_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_PROMPTS: Final = 4  # each layer and format reads the beginnings of these prompts
WEIGHT_TOKENS: Final = 256
_SAME: Final = 1e-3  # two runs of the same layers differ by no more, in nats


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
        step: told how many more decoder layers have been measured.
    """
    found = layer_modules(model, layers)
    if not all(found):
        return ()
    decoder = decoder_layers(model, layers)
    runs = [_Run(model, decoder, ids[:WEIGHT_TOKENS]) for ids in prompts[:WEIGHT_PROMPTS]]
    result = []
    for number, modules in enumerate(found):
        nats: dict[WeightScheme, float] = {WHOLE: 0.0}
        for scheme in ROUNDED:
            with rounded(modules, scheme):
                lost = [run.nats(number) for run in runs]
            nats[scheme] = float(f"{max(0.0, sum(lost) / len(lost)):.6g}")
        # a format with more bits may always stand in for one with fewer
        bits = {scheme: FORMATS[scheme].linear_bits for scheme in ROUNDED}
        nats |= {s: min(nats[o] for o in ROUNDED if bits[o] <= bits[s]) for s in ROUNDED}
        result.append(
            LayerWeights(modules=tuple(modules), size_bytes=weight_sizes(modules), nats=nats)
        )
        step(1)
    return tuple(result)


class _Run:
    """One prompt through the unrounded model, and again from any of its layers on."""

    def __init__(self, model: PreTrainedModel, decoder: list[nn.Module], ids: list[int]) -> None:
        self.model, self.decoder, self.ids = model, decoder, ids
        self.outputs: list[Any] = []  # of each layer: a tensor, or a tuple that begins with it

        def note(module: nn.Module, args: object, output: object) -> None:
            self.outputs.append(output)

        with ExitStack() as stack:
            for layer in decoder:
                stack.enter_context(layer.register_forward_hook(note))
            self.full = _predict(model, ids)
        self.resumes = True
        # an architecture may hand more from layer to layer than what a layer returns
        self.resumes = self.nats(len(decoder) - 1) < _SAME

    def nats(self, first: int) -> float:
        """KL of the model as it is now to the unrounded one, the same up to layer `first`."""
        known = first if self.resumes else 0
        with _skipped(self.decoder[:known], self.outputs[known - 1] if known else None):
            return float(mean_kl(self.full, _predict(self.model, self.ids)))


@contextmanager
def _skipped(layers: list[nn.Module], output: object) -> Iterator[None]:
    """Within the block these layers do nothing and return `output`."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = lambda *args, **kwargs: output
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


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
