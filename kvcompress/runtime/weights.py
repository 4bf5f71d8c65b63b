"""Which weights a model has, in one digest: a saved cache goes on with those that filled it.

Every parameter counts with its name, dtype, shape, a sum over all of its bytes, which any single
change moves, and a sample of them. Of adapters (LoRA and its kin) those in use count, with their
strength; one that is switched off is as if it were not there, and one that is merged is a change of
the weights. It takes as long as reading the weights once, and is the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

_SAMPLE: Final = 256  # numbers of 8 bytes


def weights_digest(model: nn.Module) -> str:
    """sha256, the same wherever the weights lie; where they are shared out, of a process's part."""
    adapters = {id(p) for layer in _adapted(model) for p in _of_adapters(layer)}
    digest = hashlib.sha256()
    lines = [
        f"{name.replace('.base_layer.', '.')} {_described(tensor)}"
        for name, tensor in _weights(model)
        if id(tensor) not in adapters
    ]
    for layer_name, layer in model.named_modules():
        if _is_adapted(layer):
            lines += [f"{layer_name}+ {line}" for line in _in_use(layer)]
    for line in sorted(lines):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the weights that layers of our own keep as buffers."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("weight", "bias"):
            yield name, buffer


# ---- adapters, as PEFT lays them out
def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_adapted(module)]


def _parts(layer: Any) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(kind, name of the adapter, its tensors)."""
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        if not isinstance(held, nn.ModuleDict | nn.ParameterDict):
            continue
        for name, part in held.items():
            yield kind, name, [part] if isinstance(part, Tensor) else [*part.parameters()]


def _of_adapters(layer: Any) -> list[Tensor]:
    return [tensor for _, _, tensors in _parts(layer) for tensor in tensors]


def _in_use(layer: Any) -> list[str]:
    """What the adapters add to a layer now; their names do not count."""
    if layer.disable_adapters or layer.merged:
        return []
    active = list(layer.active_adapters)
    strength = getattr(layer, "scaling", {})
    return [
        f"{kind} {active.index(name)} {strength.get(name)} {_described(tensor)}"
        for kind, name, tensors in _parts(layer)
        if name in active
        for tensor in tensors
    ]


# ---- a tensor
@torch.no_grad()
def _described(tensor: Tensor) -> str:
    """dtype, shape, sum and sample of a tensor's bytes; of codes of 4 bits, which processors order
    as they like, the sum of the codes; of a tensor that is elsewhere, dtype and shape."""
    own = getattr(tensor, "to_local", None)
    found = tensor.detach() if own is None else own().detach()
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        codes = found.view(torch.uint8)
        total = (codes & 15).sum(dtype=torch.int64) + (codes >> 4).sum(dtype=torch.int64)
        return f"4 bits {tuple(state.shape)} {int(total)}"
    told = f"{str(found.dtype)[6:]} {tuple(found.shape)}"
    if found.device.type == "meta" or not found.numel():
        return told
    flat = found.contiguous().reshape(-1).view(torch.uint8)
    whole = flat[: flat.numel() // 8 * 8]
    if whole.data_ptr() % 8:
        whole = whole.clone()
    numbers = whole.view(torch.int64)
    step = max(1, numbers.numel() // _SAMPLE)
    sample = numbers[::step].cpu().numpy().tobytes() + flat[whole.numel() :].cpu().numpy().tobytes()
    return f"{told} {int(numbers.sum())} {hashlib.sha256(sample).hexdigest()}"
