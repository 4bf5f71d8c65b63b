"""Opening a bundle: nothing in it is used before every file has been checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvcompress.bundle import files, manifest
from kvcompress.bundle.checks import check_parts
from kvcompress.bundle.manifest import Manifest, is_bundle
from kvcompress.bundle.source import as_bundle_error
from kvcompress.checkpoint.load import (
    Checkpoint,
    DeviceMap,
    load_config,
    load_model,
    load_tokenizer,
)
from kvcompress.checkpoint.settings import vetted
from kvcompress.errors import BundleError
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_AGAIN: Final = "copy or export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked.

    Attributes:
        digest: sha256 of manifest.json, which holds the sha256 of every other file: pinning this
            one number pins the bundle.
        checkpoint: the bundle as a model directory; its settings are checked, its weights unread.
        tokenizer: pads on the left, as generation in batches needs.
    """

    path: Path
    digest: str
    manifest: Manifest
    plan: Plan
    profile: Profile
    recipe: Recipe
    params: KVParams
    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def weights_bytes(self) -> int:
        return self.manifest.weights.size_bytes


def plan_at(path: Path) -> tuple[Plan, KVParams | None]:
    """The plan and key constants of a bundle, or the plan of a file, which has no constants.

    Raises:
        KVCompressError: where the path is neither.
    """
    if not is_bundle(path):
        return Plan.load(path), None
    bundle = open_bundle(path)
    return bundle.plan, bundle.params


def open_bundle(path: Path | str) -> Bundle:
    """Check a bundle and read its small parts; the weights are hashed but not loaded.

    Raises:
        BundleError: naming the file, what is wrong with it and what to do.
    """
    root = Path(path)
    if not root.is_dir() or not is_bundle(root):
        raise BundleError(
            f"{root}: not a bundle, it has no {manifest.MANIFEST}; "
            "give a directory made by kvcompress export"
        )
    present = files.tree(root)
    source = present[manifest.MANIFEST]
    with source.open("rb") as file:
        text = file.read(manifest.LIMIT_BYTES + 1)
    listed = manifest.parse(text, str(source))
    _check_files(root, listed, set(present))
    _check_needs(root, listed)
    plan = Plan.load(root / manifest.PLAN)
    profile = Profile.load(root / manifest.FOLDER)
    recipe = Recipe.load(root / manifest.RECIPE)
    params = load_params(root / manifest.PARAMS, plan)
    with as_bundle_error():
        checkpoint = Checkpoint(str(root), root, vetted(root))
        config = load_config(checkpoint)
        tokenizer = load_tokenizer(checkpoint, padding_side="left")
    opened = Bundle(
        path=root,
        digest=hashlib.sha256(text).hexdigest(),
        manifest=listed,
        plan=plan,
        profile=profile,
        recipe=recipe,
        params=params,
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
    )
    with as_bundle_error():
        check_parts(opened)
    return opened


def load_weights(
    bundle: Bundle, device_map: DeviceMap = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The bundle's model as plain transformers loads it, with its own full cache.

    Raises:
        BundleError: where a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    with as_bundle_error():
        return load_model(
            bundle.checkpoint,
            bundle.config,
            exact=True,
            device_map="cpu" if device_map is None else device_map,
            dtype="auto" if dtype is None else dtype,
        )


def load_params(path: Path, plan: Plan) -> KVParams:
    """Key constants that fit the plan's model.

    Raises:
        BundleError: where they are damaged or of another shape.
    """
    try:
        return KVParams.load(path, plan.model)
    except ValueError as error:
        raise BundleError(
            f"{path}: no key constants can be read ({error}); profile and export again"
        ) from None


def _check_files(root: Path, listed: Manifest, present: set[str]) -> None:
    sizes = listed.sizes_bytes
    for path, size_bytes in sizes.items():
        if path not in present:
            raise BundleError(f"{root / path}: missing; {_AGAIN}")
        found = (root / path).stat().st_size
        if found != size_bytes:
            kind = "truncated" if found < size_bytes else "changed"
            raise BundleError(
                f"{root / path}: {kind}, it has {found} bytes and the manifest says {size_bytes}; "
                f"{_AGAIN}"
            )
    extra = sorted(present - set(sizes) - {manifest.MANIFEST})
    if extra:
        raise BundleError(f"{root / extra[0]}: not listed in {manifest.MANIFEST}; remove it")
    for entry, found_entry in zip(
        sorted(listed.files, key=lambda e: e.path), files.digests(root, sizes), strict=True
    ):
        if entry.sha256 != found_entry.sha256:
            raise BundleError(
                f"{root / entry.path}: changed after the export, its sha256 is "
                f"{found_entry.sha256[:12]}… and the manifest says {entry.sha256[:12]}…; {_AGAIN}"
            )


def _check_needs(root: Path, listed: Manifest) -> None:
    for need in listed.needs:
        name, _, oldest = need.partition(">=")
        try:
            found = version(name)
        except PackageNotFoundError:
            raise BundleError(f"{root}: needs {need}; pip install '{need}'") from None
        if _release(found) < _release(oldest):
            raise BundleError(f"{root}: needs {need}, found {found}; pip install -U '{need}'")


def _release(text: str) -> tuple[int, ...]:
    """``2.11.0+cu130`` as (2, 11); suffixes and final zeros do not matter to a smallest version."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
