"""The league's cells: what one holds, and what it depends on."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Final

from kvcompress import __version__
from kvcompress.evaluate.workloads import WorkloadSuite
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.measure import machine
from kvcompress.measure.cells import Folder
from kvcompress.plan import StrictModel

_ROOT: Final = Path(__file__).parents[1]
# parts whose code decides an outcome once the plan is there
_DECIDING: Final = (
    *("plan.py", "head_plan.py", "rules.py", "accounting.py"),
    *("evaluate", "evict", "kernels", "measure", "quant", "runtime"),
)


class Measured(StrictModel):
    """An outcome as it lies on disk; `code` is the `code_hash` that measured it."""

    key: str
    code: str
    seconds: float
    outcome: WorkloadOutcome


def cell_store(folder: Path, any_code: bool = False) -> Folder[Measured]:
    """The cells under `folder`.

    Args:
        any_code: accept cells that other versions of this package's code measured.
    """
    return Folder(folder, Measured, lambda cell: any_code or cell.code == code_hash())


def cell_key(plan_json: str | None, params_hash: str, suite: str, weights: str) -> str:
    """Hash of everything but the code that an outcome depends on.

    Args:
        plan_json: a plan, or what else decides how the cache is held; None for the reference.
        suite, weights: `suite_hash` and the hash of the model's weights.
    """
    parts = {
        "plan": plan_json,
        "params": params_hash if plan_json else "",
        "suite": suite,
        "weights": weights,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    return {"kvcompress": __version__, **machine.versions("torch", "transformers")}


def suite_hash(suite: WorkloadSuite) -> str:
    """Hash of the documents, questions and windows."""
    digest = hashlib.sha256()
    told = (suite.workload, suite.context_tokens, suite.chunk_tokens, suite.feed_tokens)
    digest.update(repr((told, suite.documents, suite.samples, suite.seed)).encode())
    if suite.windows is not None:
        digest.update(suite.windows.numpy().tobytes())
    return digest.hexdigest()[:32]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@cache
def code_hash() -> str:
    """Hash of the source files that decide an outcome."""
    digest = hashlib.sha256()
    for part in _DECIDING:
        place = _ROOT / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(_ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
