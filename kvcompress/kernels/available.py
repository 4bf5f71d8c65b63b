"""Whether the Triton kernels can run, and if not, why not.

Triton itself is imported nowhere but in the files of this package whose names begin with `triton`,
which are imported when a kernel is first called.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Final

import torch

from kvcompress.errors import KVCompressError

OLDEST: Final = (3, 5)
_OLDEST_CARD: Final = (8, 0)  # compute capability; older ones lack bfloat16 in the matrix units


@dataclass(frozen=True, slots=True)
class TritonStatus:
    """Whether Triton kernels run on a kind of device.

    Attributes:
        version: of Triton, None where it is not installed.
        reason: why they do not run; None if they do.
    """

    version: str | None
    reason: str | None

    @property
    def usable(self) -> bool:
        return self.reason is None


def triton_status(device: torch.device | str = "cuda") -> TritonStatus:
    """What stands between the kernels and `device`: a CUDA device, or the CPU by the interpreter.

    The interpreter runs the same kernels, slowly, for tests; Triton decides on it once, when it is
    first imported, from ``TRITON_INTERPRET=1``.
    """
    if importlib.util.find_spec("triton") is None:
        return TritonStatus(None, "Triton is not installed: pip install 'kvcompress[gpu]'")
    try:
        import triton
    except ImportError as error:
        return TritonStatus(None, f"Triton cannot be imported: {error}")
    version = triton.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return TritonStatus(version, f"Triton {version} is too old: {oldest} or newer is needed")
    kind = torch.device(device).type
    if kind == "cuda":
        return TritonStatus(version, _cuda_reason(device))
    if kind == "cpu":
        interprets = "Triton runs on a CPU only in its interpreter: set TRITON_INTERPRET=1 first"
        return TritonStatus(version, None if interpreting() else interprets)
    return TritonStatus(version, f"there are no Triton kernels for {kind} devices")


def _cuda_reason(device: torch.device | str) -> str | None:
    if interpreting():
        return None  # the interpreter copies to the host and back
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA devices"
    have = torch.cuda.get_device_capability(device)
    if have < _OLDEST_CARD:
        return f"compute capability {have[0]}.{have[1]} is older than 8.0"
    return None


def interpreting() -> bool:
    """Whether Triton was imported as an interpreter in this process."""
    if "triton" not in sys.modules:
        import triton  # noqa: F401
    from triton import knobs

    return bool(knobs.runtime.interpret)


def require_triton(device: torch.device | str) -> None:
    """Raise where the kernels cannot run on `device`.

    Raises:
        KVCompressError: with the reason.
    """
    reason = triton_status(device).reason
    if reason is not None:
        raise KVCompressError(f"the Triton kernels cannot run on {device}: {reason}")
