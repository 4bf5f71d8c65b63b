"""The profile: a directory of measurements, from which plans are solved again and again.

A profile has the parts that its recipe's policy reads, and those that were asked for beside.

profile.json            this value; token ids of classes, but no calibration text
kv_params.safetensors   key constants, see `kvcompress.quant.keystats`
plan.json               the plan of the recipe's own policy
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from kvcompress.atomic import write_file
from kvcompress.errors import PlanError, ProfileError
from kvcompress.plan import (
    ByteCount,
    HeadPlan,
    ModelShape,
    NonNegativeInt,
    PositiveInt,
    StrictModel,
    Text,
    TokenIds,
    WeightScheme,
    parsed,
)
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import PARTS, Part, Recipe
from kvcompress.strict import JSON_LIMIT_BYTES, NotStrictError, load_json, read_text

PROFILE_FILE: Final = "profile.json"
PARAMS_FILE: Final = "kv_params.safetensors"
PLAN_FILE: Final = "plan.json"
SCHEMA_VERSION: Final = 3  # 1 had losses without gradients only, 2 always all parts
_OLD_PATH: Final = (0.125, 0.375, 0.625, 0.875, 1.0)  # of the way to bare heads, up to version 2


Table = tuple[tuple[tuple[float, ...], ...], ...]  # [layer][KV head][candidate]


class Provenance(StrictModel):
    """Where the numbers come from.

    Attributes:
        data_hash: sha256 of the token ids of all prompts.
        weights_hash: sha256 over a sample of every parameter.
        held_out_rows: rows of each prompt that were measured.
        versions: of the packages that computed the numbers.
    """

    data: str
    data_hash: str
    weights_hash: str
    prompts: PositiveInt
    prompt_tokens: PositiveInt
    held_out_rows: PositiveInt
    device: str
    dtype: str
    versions: dict[str, str]


class ExactSetting(StrictModel):
    """The losses that were measured with these sinks and recent tokens in every head.

    Attributes:
        losses: loss of each candidate in each head, see `kvcompress.profile.losses`.
    """

    sink_tokens: NonNegativeInt
    recent_tokens: PositiveInt
    candidates: tuple[HeadPlan, ...]
    losses: Table


class LayerWeights(StrictModel):
    """The linear layers of one decoder layer, in each format.

    Attributes:
        modules: their full names.
        nats: KL per token to the model as it is, when this decoder layer alone is in the format.
    """

    modules: tuple[str, ...]
    size_bytes: dict[WeightScheme, ByteCount]
    nats: dict[WeightScheme, float]


class TriedPlan(StrictModel):
    """A plan that the profiler ran on calibration prompts.

    Attributes:
        name: what the plan was to show.
        digest: of its heads and their settings, see `assemble.plan_digest`.
        loss: sum of its heads' losses; None where they were not measured.
        nats: KL per token to the full cache, the mean over the held-out rows of prompts that do
            not ask for what stands far above; of all, where calibration has no such prompt.
        recall_nats: the same over prompts that do; None where calibration has none.
    """

    name: str
    digest: str = ""
    loss: float | None
    nats: float
    recall_nats: float | None = None


class Profile(StrictModel):
    """See the module docstring.

    Attributes:
        parts: what was measured. `recovery` is FastGen's, `losses` are the byte planner's,
            `weights` the formats of every decoder layer, `heads` KVzip's scores of heads.
        model: path or name that was profiled.
        weight_bytes: bytes of the model's weights in each scheme.
        special_share, punct_share: share of a prompt's tokens in each class, a high quantile.
        rotations: per layer, the rotary embedding that the probe found.
        chain: FastGen's keep-sets in cost order; see `evict.keep_set_ladder`.
        recovery: kept attention mass of each keep-set of `chain`, by a low quantile over prompts
            and rows.
        recovery_l1: ‖A − Â‖₁ at the same prompts and rows.
        candidates: the heads that the byte planner chooses from.
        losses: loss of each candidate, see `kvcompress.profile.losses`.
        loss_unit: ``nats`` of KL per predicted token, or ``residual``; see `losses`.
        tried: plans that were run, which say what a sum of losses costs in fact.
        fewer: candidates and losses with fewer sinks and recent tokens than the recipe's.
        weight_layers: per decoder layer; empty where the model came quantized.
        loss_note: why losses are not in nats, empty where they are.
        calibration_note: what no calibration prompt shows, see `kinds.far_back_note`.
        repeat_ids: token ids of a request to repeat the text, for scorers that need it.
        surrogate_r2: ``[layer][KV head]`` R² of the trained surrogate on prompts that it was not
            trained on; None for other scorers.
        repeat_heads: ``[layer][KV head]`` KVzip's score of each head, see `repeat.head_scores`.
        params_sha256: of the file with the key constants that were measured with; None in profiles
            made before it was noted.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    parts: tuple[Part, ...]
    model: str
    shape: ModelShape
    recipe: Recipe
    provenance: Provenance
    tokenizer_hash: str
    weight_bytes: dict[str, ByteCount]
    special_ids: TokenIds
    punct_ids: TokenIds
    repeat_ids: TokenIds = ()
    special_share: Annotated[float, Field(ge=0.0, le=1.0)]
    punct_share: Annotated[float, Field(ge=0.0, le=1.0)]
    rotations: tuple[str, ...]
    chain: tuple[HeadPlan, ...] = ()
    recovery: Table = ()
    recovery_l1: Table = ()
    candidates: tuple[HeadPlan, ...] = ()
    losses: Table = ()
    loss_unit: Literal["nats", "residual"] = "residual"
    tried: tuple[TriedPlan, ...] = ()
    fewer: tuple[ExactSetting, ...] = ()
    weight_layers: tuple[LayerWeights, ...] = ()
    loss_note: str = ""
    calibration_note: str = ""
    surrogate_r2: tuple[tuple[float, ...], ...] | None = None
    repeat_heads: tuple[tuple[float, ...], ...] = ()
    params_sha256: Text | None = None

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        tables: list[tuple[str, Table, tuple[HeadPlan, ...]]] = [
            ("recovery", self.recovery, self.chain),
            ("recovery_l1", self.recovery_l1, self.chain),
            *(("losses", setting.losses, setting.candidates) for setting in self.settings),
        ]
        for name, table, columns in tables:
            if not (table or columns or name.split("_")[0] in self.parts):
                continue
            sizes = {(len(layer), len(row)) for layer in table for row in layer}
            if len(table) != self.shape.layers or sizes != {(self.shape.kv_heads, len(columns))}:
                raise ValueError(f"{name} does not cover every layer, KV head and candidate")
        return self

    def need(self, part: Part, wanted: str) -> None:
        """
        Raises:
            PlanError: where `part` was not measured, with the command that adds it.
        """
        if part not in self.parts:
            raise PlanError(
                f"{wanted} reads {part}, which the profile did not measure; add it: "
                f"kvcompress profile {self.model} --also {part} -o DIR, with the profile's own DIR"
            )

    @property
    def settings(self) -> tuple[ExactSetting, ...]:
        """The recipe's own sinks and recent tokens first, then the fewer ones."""
        own = ExactSetting(
            sink_tokens=self.recipe.keep.sink_tokens,
            recent_tokens=self.recipe.keep.recent_tokens,
            candidates=self.candidates,
            losses=self.losses,
        )
        return (own, *self.fewer)

    def planned_weight_bytes(self, weights: tuple[WeightScheme, ...]) -> int:
        """Bytes of all weights with these formats of the decoder layers, one for each."""
        pairs = list(zip(self.weight_layers, weights, strict=True))
        rest = self.weight_bytes["bf16"] - sum(layer.size_bytes["bf16"] for layer, _ in pairs)
        return rest + sum(layer.size_bytes[scheme] for layer, scheme in pairs)

    def save(self, directory: Path | str) -> None:
        """Write profile.json; it appears whole or not at all."""
        write_file(Path(directory) / PROFILE_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read a finished profile directory.

        Raises:
            ProfileError: if it is missing, unfinished, damaged or of a newer version.
        """
        directory = Path(directory)
        path = directory / PROFILE_FILE
        if not path.is_file():
            begun = (directory / "prompts").is_dir()
            what = "unfinished, run the same profile command again" if begun else "no profile there"
            raise ProfileError(f"{directory}: {what}; give a directory that `profile` has written")
        try:
            return parsed(cls, _of_this_version(read_text(path, JSON_LIMIT_BYTES)))
        except NotStrictError as error:
            raise ProfileError(f"{path}: {error}; profile again") from None

    def load_params(self, directory: Path | str) -> KVParams:
        """The key constants beside profile.json.

        Raises:
            ProfileError: if they are missing, damaged, of another model or of another profile.
        """
        path = Path(directory) / PARAMS_FILE
        try:
            params = KVParams.load(path, self.shape)
        except ValueError as error:
            raise ProfileError(
                f"{path}: no usable key constants ({error}); profile again"
            ) from None
        if self.params_sha256 not in (None, file_sha256(path)):
            raise ProfileError(f"{path}: not the key constants of this profile; profile again")
        return params


def _of_this_version(text: str) -> str:
    """A profile of version 1 or 2 in today's words; anything else as it is.

    All parts were measured then, and `path_nats` was the KL on the way to bare heads.
    """
    data = load_json(text.encode())
    if not isinstance(data, dict) or data.get("schema_version") not in (1, 2):
        return text
    nats = data.pop("path_nats", None) or []
    try:
        bare = data["candidates"].index(HeadPlan().model_dump(mode="json"))
        whole = sum(row[bare] for layer in data["losses"] for row in layer)
        points = zip(_OLD_PATH, nats, strict=bool(nats))
        tried = [{"name": "path", "loss": share * whole, "nats": there} for share, there in points]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise NotStrictError("its tables do not belong together") from None
    return json.dumps({**data, "parts": PARTS, "tried": tried, "schema_version": SCHEMA_VERSION})


def file_sha256(path: Path) -> str:
    """sha256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
