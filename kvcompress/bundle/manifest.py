"""manifest.json: what a bundle holds, with the size and sha256 of every other file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from kvcompress.errors import BundleError
from kvcompress.plan import ByteCount, StrictModel, explain
from kvcompress.recipe import WeightScheme
from kvcompress.strict import Json, NotStrictError, load_json

SCHEMA: Final = 1
FOLDER: Final = "kvcompress"
MANIFEST: Final = f"{FOLDER}/manifest.json"
PLAN: Final = f"{FOLDER}/plan.json"
PARAMS: Final = f"{FOLDER}/kv_params.safetensors"
PROFILE: Final = f"{FOLDER}/profile.json"
RECIPE: Final = f"{FOLDER}/recipe.yaml"
INDEX: Final = "model.safetensors.index.json"
CARD: Final = "README.md"
LIMIT_BYTES: Final = 2**24  # a hundred thousand files
REQUIRED: Final = ("config.json", INDEX, CARD, PLAN, PARAMS, PROFILE, RECIPE)

# Nothing that Python would run or unpickle has a place in a bundle.
SUFFIXES: Final = frozenset(
    (".jinja", ".json", ".jsonl", ".md", ".model", ".safetensors", ".tiktoken", ".txt", ".yaml", "")
)
_REFUSED_NAMES: Final = frozenset(("adapter_config.json",))  # would pull in weights from elsewhere


def checked_path(path: str) -> str:
    """`path`, if it is relative, has forward slashes, stays inside the bundle and names plain data.

    Raises:
        ValueError: saying which of these it is not.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or "\\" in path or ":" in path or "\0" in path:
        raise ValueError("must be relative, with forward slashes")
    if not path.isprintable():
        raise ValueError("must be printable")
    if not path or str(pure) != path or ".." in pure.parts:
        raise ValueError("must not leave the bundle directory")
    if pure.suffix.lower() not in SUFFIXES or pure.name in _REFUSED_NAMES:
        raise ValueError(f"{pure.suffix or pure.name} files have no place in a bundle")
    return path


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(max_length=1024), AfterValidator(checked_path)]
Need = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*>=[0-9]+(\.[0-9]+)*$")]


class FileEntry(StrictModel):
    """One file of the bundle."""

    path: RelativePath
    size_bytes: ByteCount
    sha256: Sha256


class BaseModelEntry(StrictModel):
    """The model that was compressed.

    Attributes:
        id: its name on the Hub, or the name of the directory it was read from.
        config_hash: see `kvcompress.runtime.model.families.config_hash`.
    """

    id: str
    config_hash: Sha256


class WeightsEntry(StrictModel):
    """How the weights are stored.

    Attributes:
        size_bytes: of all weight files together.
        kept: linear layers that stay in 16 bits although the format would round them, because
            their sizes do not fit its kernels or the plan spends the bytes; the output head is
            never rounded nor listed.
    """

    format: WeightScheme
    size_bytes: ByteCount
    kept: tuple[str, ...] = ()


class Manifest(StrictModel):
    """See FORMAT.md.

    Attributes:
        created: UTC, ISO 8601.
        needs: packages with their oldest version that loading asks for.
        measured: figures that were measured before the export, by name.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    schema_version: Literal[1] = Field(alias="schema")
    kvcompress_version: str
    created: str
    base_model: BaseModelEntry
    tokenizer_hash: Sha256
    weights: WeightsEntry
    needs: tuple[Need, ...]
    measured: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        paths = {entry.path for entry in self.files}
        folded = Counter(entry.path.casefold() for entry in self.files)
        twice = [path for path, count in folded.items() if count > 1]
        if twice:
            raise ValueError(f"files lists {twice[0]} twice")
        missing = [path for path in REQUIRED if path not in paths]
        if missing:
            raise ValueError(f"files lists no {missing[0]}")
        if MANIFEST in paths:
            raise ValueError(f"files must not list {MANIFEST} itself")
        return self

    @property
    def sizes_bytes(self) -> dict[str, int]:
        """Size of each listed file by its path."""
        return {entry.path: entry.size_bytes for entry in self.files}

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def is_bundle(path: Path | str) -> bool:
    """Whether `path` looks like a bundle, sound or not."""
    return (Path(path) / MANIFEST).exists()


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest strictly.

    Raises:
        BundleError: for anything that is not a schema-1 manifest, a newer schema by name.
    """
    try:
        data: Json = load_json(text, LIMIT_BYTES)
    except NotStrictError as error:
        raise BundleError(f"{where}: {error}; the file is damaged, copy the bundle again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"{where}: bundle schema {schema} is newer than {SCHEMA}, the newest that this "
            "kvcompress reads; upgrade kvcompress"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{where}: {explain(error)}") from None
