"""One digest of a model's weights, by which a saved cache knows the weights that filled it.

Every parameter counts with its name, dtype, shape and bytes. Of adapters (LoRA and its kin) those
in use count, with their strength. An adapter that is switched off counts as absent; one that is
merged counts as a change of the weights. The digest is the same on every device.

The bytes are summed where they lie: rows of 32 KiB, every 8 bytes as a number times an odd random
number of its place, modulo 2^64. A change of one number changes its row's sum; any other change,
such as two numbers that swap places, leaves it unchanged with a chance below 2^-30. sha256 over the
sums of all rows keeps the rows in order. The digest guards against mistakes, not against attackers,
who can find two models of one digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

_ROW: Final = 4096  # numbers of 8 bytes
_AT_ONCE: Final = 64 * _ROW


def weights_digest(model: nn.Module) -> str:
    """sha256 of the weights on any device; under tensor parallelism, of this process's part."""
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


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """dtype, shape and digest of every weight by its name, of a model without adapters."""
    return {name: _described(tensor) for name, tensor in _weights(model)}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, persistent buffers, and the scales that bitsandbytes keeps beside int8 codes.
    Names and numbers are those of `Int8Linear`, which may serve a layer without another digest."""
    for prefix, module in model.named_modules():
        at = f"{prefix}." if prefix else ""
        for name, tensor in _own_tensors(module):
            yield at + name, tensor.float() if name == "bias" else tensor
        scale = _int8_scale(module)
        if scale is not None:
            yield at + "scale", scale.float() / 127


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _int8_scale(module: nn.Module) -> Tensor | None:
    """Largest magnitude of each row; the first forward moves it from the weight to the state."""
    scale = getattr(getattr(module, "weight", None), "SCB", None)
    found: Tensor | None = getattr(getattr(module, "state", None), "SCB", None)
    return found if scale is None else scale


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
    """Lines that describe the adapters in use on a layer; their names do not count."""
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
    """dtype, shape and digest of a tensor's bytes; of one that is elsewhere, dtype and shape."""
    own = getattr(tensor, "to_local", None)
    found = tensor.detach() if own is None else own().detach()
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        codes, scales = _four_bits(found, state)
        return f"4 bits {tuple(state.shape)} {_digest(codes)} {_digest(scales)}"
    told = f"{str(found.dtype)[6:]} {tuple(found.shape)}"
    if found.device.type == "meta" or not found.numel():
        return told
    return f"{told} {_digest(found)}"


def _four_bits(packed: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """Codes and bfloat16 scales of bitsandbytes, in the order in which a file has them: where the
    processor has AVX512-BF16, the first forward lays both out anew and rounds the scales."""
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.contiguous()
        codes, _ = functional._convert_weight_packed_for_cpu_inverse(packed, copy(state))
        return codes, scales
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    return packed, scales.float().to(torch.bfloat16)


def _digest(tensor: Tensor) -> str:
    """Of a tensor's bytes in order, see above."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat[: flat.numel() // 8 * 8]
    if whole.data_ptr() % 8:
        whole = whole.clone()
    odd = _odd_numbers(flat.device)
    sums = [_row_sums(part, odd).cpu() for part in whole.view(torch.int64).split(_AT_ONCE)]
    digest = hashlib.sha256(flat[whole.numel() :].cpu().numpy().tobytes())
    for part in sums:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _row_sums(numbers: Tensor, odd: Tensor) -> Tensor:
    rows, rest = numbers.numel() // _ROW, numbers.numel() % _ROW
    numbers = numbers ^ (numbers >> 32)  # one to one; moves high bits to low ones
    sums = (numbers[: rows * _ROW].view(rows, _ROW) * odd).sum(1)
    return torch.cat([sums, (numbers[rows * _ROW :] * odd[:rest]).sum()[None]])


@cache
def _odd_numbers(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(-(1 << 62), 1 << 62, (_ROW,), generator=generator)
    return (2 * numbers + 1).to(device)
