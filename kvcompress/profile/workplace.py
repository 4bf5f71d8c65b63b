"""The directory of a profile that is not finished: completed steps lie on disk, so that a run that
was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from kvcompress.atomic import write_file
from kvcompress.errors import ProfileError
from kvcompress.profile.store import PROFILE_FILE, Profile
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

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
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

    def _made_by(self) -> dict[str, object] | None:
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

    def step(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A step as an earlier run finished it; where none did, it is made now and kept."""
        tensors = self.kept(name)
        if tensors is None:
            tensors = make()
            self.keep(name, tensors)
        return tensors

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
