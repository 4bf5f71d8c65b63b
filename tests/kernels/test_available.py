"""Why the Triton kernels cannot run, in words."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from kvcompress.errors import KVCompressError
from kvcompress.kernels import available
from kvcompress.kernels.available import require_triton, triton_status

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def triton(monkeypatch):
    """A Triton of the oldest version, that compiles for devices."""
    module = types.ModuleType("triton")
    module.__version__ = "3.6.0"
    module.knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False))
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return module


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status = triton_status("cuda")
    assert (status.version, status.usable) == (None, False)
    assert "pip install 'kvcompress[gpu]'" in status.reason


def test_an_old_triton(triton):
    triton.__version__ = "3.4.1"
    assert triton_status("cuda").reason == "Triton 3.4.1 is too old: 3.5 or newer is needed"


def test_a_cpu_needs_the_interpreter(triton):
    assert "set TRITON_INTERPRET=1 first" in triton_status("cpu").reason
    triton.knobs.runtime.interpret = True
    assert triton_status("cpu").usable
    assert triton_status("cpu").version == "3.6.0"


def test_other_devices(triton):
    assert triton_status("mps").reason == "there are no Triton kernels for mps devices"
    with pytest.raises(KVCompressError, match="cannot run on mps: there are no"):
        require_triton("mps")


def test_devices_of_cuda(triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_status("cuda").reason == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert triton_status("cuda").reason == "compute capability 7.5 is older than 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_status("cuda").usable


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (extra: gpu)")
def test_the_triton_at_hand_is_new_enough():
    import triton

    assert tuple(map(int, triton.__version__.split(".")[:2])) >= available.OLDEST
