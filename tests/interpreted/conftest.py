"""These tests run the Triton kernels in Triton's interpreter: on a CPU, slowly, exactly.

Triton decides on its interpreter when it is imported, so they need a process of their own:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

`tests/kernels/test_interpreted.py` starts one, so that a plain run has them too.
"""

from __future__ import annotations

import os

import pytest

# Triton 3.9 warns that a default of the GPU compiler will change
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from kvcompress.kernels.available import triton_status

    reason = triton_status("cpu").reason
    for item in items:
        if reason is not None and "tests/interpreted" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"{reason} (tests/kernels runs these)"))
