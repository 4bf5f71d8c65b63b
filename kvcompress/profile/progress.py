"""A profile in the making: finished prompts on disk, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvcompress.atomic import write_file
from kvcompress.errors import ProfileError
from kvcompress.profile.measure import PromptResult
from kvcompress.profile.store import PROFILE_FILE, Profile
from kvcompress.quant.keystats import KeyStats
from kvcompress.strict import JSON_LIMIT_BYTES, NotStrictError, load_json, read_bytes

SETTINGS_FILE: Final = "settings.json"
PROMPTS: Final = "prompts"


class Workplace:
    """The profile directory while prompts are run.

    Args:
        settings: everything that the numbers depend on, as JSON values.

    Raises:
        ProfileError: if the directory holds something else, or a profile by other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings = directory, settings
        if directory.exists() and not directory.is_dir():
            raise ProfileError(f"{directory}: is a file; give a directory for the profile")
        self._refuse_foreign()
        made = self._made_by()
        if made is not None and made != settings:
            names = sorted(k for k in {*made, *settings} if made.get(k) != settings.get(k))
            raise ProfileError(
                f"{directory}: holds a profile by other settings ({', '.join(names)} differ); give "
                "another directory, or remove this one"
            )
        directory.mkdir(parents=True, exist_ok=True)
        if made is None:
            write_file(directory / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        (directory / PROMPTS).mkdir(exist_ok=True)

    def _refuse_foreign(self) -> None:
        if not self.directory.is_dir():
            return
        names = {p.name for p in self.directory.iterdir() if not p.name.startswith(".")}
        if names and SETTINGS_FILE not in names:
            raise ProfileError(
                f"{self.directory}: not empty and not begun by this command "
                f"({', '.join(sorted(names)[:3])}); give a new or empty directory"
            )

    def _made_by(self) -> dict[str, Any] | None:
        path = self.directory / SETTINGS_FILE
        if not path.is_file():
            return None
        try:
            made = load_json(read_bytes(path, JSON_LIMIT_BYTES))
        except NotStrictError as error:
            raise ProfileError(f"{path}: cannot read it ({error}); remove the directory") from None
        if not isinstance(made, dict):
            raise ProfileError(f"{path}: not a JSON object; remove the directory")
        return made

    def finished(self) -> Profile | None:
        """The profile, if an earlier run with the same settings came to its end."""
        if not (self.directory / PROFILE_FILE).is_file():
            return None
        return Profile.load(self.directory)

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store one finished step."""
        from safetensors.torch import save

        write_file(self._path(name), save({k: v.contiguous() for k, v in tensors.items()}))

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """A step that an earlier run finished, None if there is none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return load_file(str(path))
        except (SafetensorError, OSError):
            return None

    def _path(self, name: str) -> Path:
        return self.directory / PROMPTS / f"{name}.safetensors"

    def clear(self) -> None:
        """Remove the steps once the profile is written."""
        shutil.rmtree(self.directory / PROMPTS, ignore_errors=True)


def stats_to_tensors(stats: list[KeyStats]) -> dict[str, Tensor]:
    return {
        "count": torch.tensor([s.count for s in stats]),
        "mean": torch.stack([s.mean for s in stats]),
        "var": torch.stack([s.var for s in stats]),
    }


def tensors_to_stats(tensors: dict[str, Tensor]) -> list[KeyStats]:
    rows = zip(tensors["count"].tolist(), tensors["mean"], tensors["var"], strict=True)
    return [KeyStats(count, mean, var) for count, mean, var in rows]


def result_to_tensors(result: PromptResult) -> dict[str, Tensor]:
    return {field.name: getattr(result, field.name) for field in fields(result)}


def tensors_to_result(tensors: dict[str, Tensor]) -> PromptResult:
    return PromptResult(**tensors)
