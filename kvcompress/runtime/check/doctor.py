"""The code that runs a compressed cache on this machine, and the reason where it is not the
fastest."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

from kvcompress import __version__
from kvcompress.evict.scorers import scorer
from kvcompress.kernels.available import triton_status
from kvcompress.kernels.cpu.library import library, why_not
from kvcompress.plan import HOLDS_KV, Plan
from kvcompress.quant.keystats import KVParams
from kvcompress.runtime.static import triton_step
from kvcompress.runtime.step.cpu import EXCEPTIONS, refusal
from kvcompress.runtime.store.state import LayerSettings

_OPTIONAL: Final = {
    "lm_eval": "eval",
    "matplotlib": "plots",
    "bitsandbytes": None,
}


@dataclass(frozen=True)
class Finding:
    """A part of the installation and its state; `why` says why it is not the best there is."""

    part: str
    found: str
    why: str | None = None


def diagnose(plan: Plan | None = None, params: KVParams | None = None) -> list[Finding]:
    """The state of every part of the installation.

    Args:
        plan: its layers are looked at too.
        params: the plan's key constants.
    """
    found = [
        Finding("kvcompress", __version__),
        Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        Finding("transformers", version("transformers")),
        Finding("processor", platform.machine()),
        _cpu_kernels(),
        _cuda(),
        _gpu_kernels(),
        *(_package(name, extra) for name, extra in _OPTIONAL.items()),
    ]
    return found if plan is None else found + _layers(plan, params)


def _cpu_kernels() -> Finding:
    kernels = library()
    if kernels is None:
        return Finding("decoding on the CPU", "tensor operations", why_not())
    if not kernels.threads:
        return Finding(
            "decoding on the CPU",
            f"compiled kernels, {kernels.isa}, one thread",
            "torch's OpenMP runtime has no GOMP_parallel to share its threads by",
        )
    slower = None if kernels.isa == "avx512-vnni" else "the processor has no AVX-512 with VNNI"
    return Finding("decoding on the CPU", f"compiled kernels, {kernels.isa}", slower)


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        reason = "no device was found" if built else "this build of torch has no CUDA"
        return Finding("CUDA", "none", reason)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("CUDA", ", ".join(names))


def _gpu_kernels() -> Finding:
    status = triton_status("cuda")
    what = f"Triton kernels, {status.version}" if status.usable else "tensor operations"
    return Finding("decoding on a GPU", what, status.reason)


def _package(name: str, extra: str | None) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        hint = f"pip install 'kvcompress[{extra}]'" if extra else f"pip install {name}"
        return Finding(name, "not installed", hint)


def _layers(plan: Plan, params: KVParams | None) -> list[Finding]:
    """How each layer that holds keys and values decodes on the CPU, and on a GPU that is there in
    a static cache: what the gates of the two kinds of kernels answer."""
    if scorer(plan.scorer).trained and params is None:
        why = f"the scorer {plan.scorer!r} needs what was trained for it: give the bundle"
        return [Finding("layers", "unknown", why)]
    layers = (i for i in range(plan.model.layers) if plan.model.kind(i) in HOLDS_KV)
    settings = [LayerSettings(plan, params, layer) for layer in layers]
    found = _alike(settings, [refusal(own) for own in settings], "compiled kernels")
    if any(finding.why is None for finding in found):
        found.append(Finding("these layers, too", "tensor operations for", "; ".join(EXCEPTIONS)))
    if torch.cuda.is_available():
        dims, device = (plan.model.head_dim, plan.model.v_dim), torch.device("cuda")
        reasons = [triton_step.refusal(own, *dims, device) for own in settings]
        found += _alike(settings, reasons, "Triton kernels", ", static on a GPU")
    return found


def _alike(
    settings: Sequence[LayerSettings], reasons: Sequence[str | None], kernels: str, where: str = ""
) -> list[Finding]:
    """One finding for all layers of a kind that decode in the same way."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for own, reason in zip(settings, reasons, strict=True):
        groups.setdefault((own.kind, reason), []).append(own.layer)
    return [
        Finding(
            f"{_layers_named(numbers)}, {kind}{where}",
            kernels if reason is None else "tensor operations",
            reason,
        )
        for (kind, reason), numbers in groups.items()
    ]


def _layers_named(numbers: Sequence[int]) -> str:
    """``layer 3`` or ``layers 0 to 4, 6``, of rising numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = (str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
