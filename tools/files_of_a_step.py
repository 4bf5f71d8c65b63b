"""Which files of the package a forward runs through: a prompt, and a decoded token by either path.

python tools/files_of_a_step.py

Whoever reads how a token is stored has to open these. A file counts if any function of it runs;
the model is tiny, and its forward is made by hand, as `generate` makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kvcompress.kernels.cpu.library import library  # noqa: E402
from kvcompress.plan import Budget, HeadPlan  # noqa: E402
from kvcompress.runtime.cache.new import new_cache  # noqa: E402
from kvcompress.runtime.hf.attach import attach, detach  # noqa: E402
from kvcompress.runtime.names import as_argument  # noqa: E402
from kvcompress.runtime.step.cpu import FusedStep  # noqa: E402
from tests.runtime.battery import plan_for  # noqa: E402
from tests.runtime.models import build, prompts  # noqa: E402

HEAD = HeadPlan(frequent=Budget(tokens=7), local=Budget(tokens=8), k_dtype="int8", v_dtype="int8")
PROMPT, PYTORCH, COMPILED = "a prompt", "a token, PyTorch", "a token, compiled kernels"


def files_of(call: Callable[[], object]) -> set[str]:
    """Files of kvcompress with a function that runs in `call`."""
    package, found = str(ROOT / "kvcompress"), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(package):
            found.add(Path(name).relative_to(package).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@torch.no_grad()
def measured() -> dict[str, set[str]]:
    """The files of each kind of forward; without compiled kernels there are two kinds."""
    library()  # found and opened once in a process
    model, ids = build("llama"), prompts(1, 60)["input_ids"]
    attach(model, plan_for(model, HEAD))
    cache, found = new_cache(model), {}
    argument = as_argument(cache)
    try:
        found[PROMPT] = files_of(lambda: model(input_ids=ids, **argument))
        for _ in range(2):
            model(input_ids=ids[:, :1], **argument)
        if library() is not None:
            found[COMPILED] = files_of(lambda: model(input_ids=ids[:, :1], **argument))
        with patch.object(FusedStep, "serves", lambda *asked: False):
            found[PYTORCH] = files_of(lambda: model(input_ids=ids[:, :1], **argument))
    finally:
        detach(model)
    return found


if __name__ == "__main__":
    for kind, names in measured().items():
        print(f"{kind}: {len(names)} files\n  " + "\n  ".join(sorted(names)))
