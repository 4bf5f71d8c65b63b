"""bitsandbytes is imported so that it neither floods the log nor runs code from the Hub."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
import torch

from kvcompress.checkpoint.packed import import_bitsandbytes

KERNELS = "kernels"
WANTS_KERNELS = """
try:
    from kernels import get_kernel
    found = get_kernel("kernels-community/anything")
except Exception:
    found = None
"""


@pytest.mark.parametrize("before", [False, True])
def test_importing_it_runs_no_kernel_from_the_hub(before, tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text(WANTS_KERNELS)
    (tmp_path / "kernels.py").write_text("def get_kernel(name): return name")
    monkeypatch.syspath_prepend(tmp_path)
    held = [n for n in sys.modules if n.split(".")[0] in ("bitsandbytes", "kernels")]
    for name in held:
        monkeypatch.delitem(sys.modules, name)
    if before:
        importlib.import_module(KERNELS)
    import_bitsandbytes()
    assert sys.modules["bitsandbytes"].found is None
    assert ("kernels" in sys.modules) is before
    kernels = importlib.import_module(KERNELS)
    assert kernels.get_kernel(1) == 1  # the user's own package goes on
    for name in ("bitsandbytes", "kernels"):
        del sys.modules[name]


STEP = """
import torch
@torch.compile
def step(x): return 2 * x
@torch.compile(dynamic=True)
def other(x): return 3 * x
"""


def test_what_it_compiles_is_compiled_when_it_is_called(tmp_path, monkeypatch):
    told, compile_now = [], torch.compile

    def compiling(model, **options):
        told.append((model.__name__, options))
        return model

    (tmp_path / "bitsandbytes.py").write_text(STEP)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "compile", compiling)
    import_bitsandbytes()
    found = sys.modules.pop("bitsandbytes")
    assert torch.compile is compiling and told == []
    assert [found.step(1), found.step(2), found.other(1)] == [2, 4, 3]
    assert told == [("step", {}), ("other", {"dynamic": True})]
    monkeypatch.undo()
    assert torch.compile is compile_now


def test_it_is_quiet_about_casts_and_loud_about_the_rest(caplog):
    import_bitsandbytes()
    import_bitsandbytes()
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16", torch.bfloat16)
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert len(logger.filters) == 1
