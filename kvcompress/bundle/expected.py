"""What an export knows of a bundle before it is read again: every part of it by itself.

A wrong tensor, plan or constant may move logits by less than rounding does. So the process that
wrote a bundle hands over what it meant to write, and the one that reads it compares exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.bundle import manifest
from kvcompress.errors import BundleError
from kvcompress.strict import load_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kvcompress.bundle.read import Bundle
    from kvcompress.plan import Plan


@dataclass(frozen=True)
class Expected:
    """What a bundle has to hold.

    Attributes:
        logits: of `check_logits`, by the model that was saved.
        weights: dtype, shape and digest of each of its tensors.
        parts: the plan, and the sha256 of the key constants; empty where they are not known.
    """

    logits: Tensor
    weights: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(logits: Tensor, model: PreTrainedModel, plan: Plan, params: Path) -> Expected:
        """Of the model that was saved, the plan and the file of key constants."""
        from kvcompress.runtime.model.weights import tensor_digests

        parts = {manifest.PLAN: plan.to_json(), manifest.PARAMS: _sha256(params)}
        return Expected(logits, tensor_digests(model), parts)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        told = {"weights": json.dumps(self.weights), "parts": json.dumps(self.parts)}
        save_file({"logits": self.logits}, path, told)

    @staticmethod
    def load(path: Path) -> Expected:
        """What `save` wrote; a file of logits alone expects nothing else."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            logits: Tensor = file.get_tensor("logits")
        return Expected(logits, _strings(told, "weights"), _strings(told, "parts"))


def _strings(told: Mapping[str, str], key: str) -> dict[str, str]:
    found = load_json(told.get(key, "{}"))
    assert isinstance(found, dict)
    return {str(name): str(value) for name, value in found.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_parts_written(bundle: Bundle, model: PreTrainedModel, expected: Expected) -> None:
    """Weights, plan and key constants are those that were to be written.

    Raises:
        BundleError: naming the first part that is another.
    """
    from kvcompress.runtime.model.weights import tensor_digests

    found = {manifest.PLAN: bundle.plan.to_json()}
    found[manifest.PARAMS] = _sha256(bundle.path / manifest.PARAMS)
    for name, wanted in expected.parts.items():
        if found[name] != wanted:
            raise BundleError(
                f"{bundle.path / name}: not what the export was to write; report this as a bug"
            )
    read = tensor_digests(model) if expected.weights else {}
    wrong = sorted({*read.items()} ^ {*expected.weights.items()})
    if wrong:
        raise BundleError(
            f"{bundle.path}: the weights read again are not those that were saved: {wrong[0][0]} "
            "differs; report this as a bug"
        )
