"""Opening a bundle: nothing in it is used before every file has been checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from kvcompress.bundle import files, manifest
from kvcompress.bundle.manifest import Manifest
from kvcompress.errors import BundleError
from kvcompress.fingerprint import tokenizer_hash
from kvcompress.plan import Plan
from kvcompress.profile.store import Profile
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import Recipe

_MANIFEST_LIMIT_BYTES: Final = 64 * 2**20
_AGAIN: Final = "copy or export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were all checked.

    Attributes:
        digest: sha256 of manifest.json, and through it of everything; pin it to pin the bundle.
    """

    path: Path
    digest: str
    manifest: Manifest
    plan: Plan
    profile: Profile
    recipe: Recipe
    params: KVParams

    @property
    def weights_bytes(self) -> int:
        return self.manifest.weights.size_bytes


def is_bundle(path: Path | str) -> bool:
    """Whether `path` looks like a bundle, sound or not."""
    return (Path(path) / manifest.MANIFEST).exists()


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
    if source.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{source}: larger than any manifest; {_AGAIN}")
    text = source.read_bytes()
    listed = manifest.parse(text, str(source))
    _check_files(root, listed, set(present))
    _check_needs(root, listed)
    _check_weights(root, listed)
    plan = Plan.load(root / manifest.PLAN)
    _check_model(root, listed, plan)
    _check_tokenizer(root, listed, plan)
    return Bundle(
        path=root,
        digest=hashlib.sha256(text).hexdigest(),
        manifest=listed,
        plan=plan,
        profile=Profile.load(root / manifest.FOLDER),
        recipe=Recipe.load(root / manifest.RECIPE),
        params=load_params(root / manifest.PARAMS, plan),
    )


def load_params(path: Path, plan: Plan) -> KVParams:
    """Key constants that fit the plan's model.

    Raises:
        BundleError: where they are damaged or of another shape.
    """
    from safetensors import SafetensorError

    try:
        params = KVParams.load(path)
    except (SafetensorError, ValueError) as error:
        raise BundleError(
            f"{path}: no key constants can be read ({error}); profile and export again"
        ) from None
    shape = plan.model
    wanted = [(shape.kv_heads, shape.head_dim)] * shape.layers
    if [tuple(center.shape) for center in params.k_center] != wanted:
        raise BundleError(
            f"{path}: the plan needs key constants for {shape.layers} layers of {wanted[0]}, these "
            f"are for {len(params.k_center)} of {tuple(params.k_center[0].shape)}; profile again"
        )
    return params


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
    """``2.11.0+cu130`` as (2, 11): what comes after the numbers does not order our needs."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _check_weights(root: Path, listed: Manifest) -> None:
    """The parts of config.json and the index that decide what gets loaded, and from where."""
    from kvcompress.quant.weights import FORMATS

    config = _json(root / "config.json")
    pointer = {"schema": listed.schema_version, "manifest": manifest.MANIFEST}
    if config.get("kvcompress") != pointer:
        raise BundleError(
            f"{root / 'config.json'}: its kvcompress entry is not {pointer}; {_AGAIN}"
        )
    name = listed.weights.format
    if not FORMATS[name].matches(config.get("quantization_config")):
        raise BundleError(
            f"{root / 'config.json'}: its quantization_config is not that of {name} weights; "
            f"{_AGAIN}"
        )
    index = _json(root / manifest.INDEX).get("weight_map")
    named = set(index.values()) if isinstance(index, dict) else set()
    tensors = {path for path in listed.sizes_bytes if path.endswith(".safetensors")}
    stored = tensors - {manifest.PARAMS}
    if not named or named != stored:
        odd = sorted(map(str, named ^ stored)) or ["nothing"]
        raise BundleError(
            f"{root / manifest.INDEX}: {odd[0]} is not both a weight file of the bundle and in the "
            f"index; {_AGAIN}"
        )


def _check_model(root: Path, listed: Manifest, plan: Plan) -> None:
    from transformers import AutoConfig

    from kvcompress.runtime.families import config_hash

    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BundleError(f"{root / 'config.json'}: {_first_line(error)}") from None
    if config_hash(config) != listed.base_model.config_hash:
        raise BundleError(
            f"{root / 'config.json'}: describes another model than the manifest; {_AGAIN}"
        )
    if plan.model.config_hash != listed.base_model.config_hash:
        raise BundleError(
            f"{root / manifest.PLAN}: was made for another model than config.json; {_AGAIN}"
        )


def _check_tokenizer(root: Path, listed: Manifest, plan: Plan) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            root, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise BundleError(f"{root}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if tokenizer_hash(tokenizer) != listed.tokenizer_hash:
        raise BundleError(f"{root}: its tokenizer is not the one in the manifest; {_AGAIN}")
    if plan.tokenizer_hash not in (None, listed.tokenizer_hash):
        raise BundleError(
            f"{root / manifest.PLAN}: was made with another tokenizer, so its special and "
            "punctuation ids mean other tokens; profile and export again"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path}: not a JSON object; {_AGAIN}")
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
