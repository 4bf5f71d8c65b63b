"""The recipe: a YAML file in which a team says what it wants of a compressed model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from kvcompress.errors import RecipeError
from kvcompress.head_plan import TOKENS_LIMIT
from kvcompress.plan import (
    ROUNDED,
    WHOLE,
    Budget,
    HeadPlan,
    KVDtype,
    NonNegativeInt,
    PerRequest,
    PositiveInt,
    Recall,
    ScorerName,
    Slots,
    StrictModel,
    Stride,
    WeightScheme,
    check_stride,
    explain,
    without_unset_stride,
)
from kvcompress.registry import SUMS
from kvcompress.storage import PAIRS
from kvcompress.strict import YAML_LIMIT_BYTES, Json, NotStrictError, load_yaml, read_text

# what a profile measures: kept attention (FastGen), losses of candidates (byte plans), formats of
# every decoder layer's weights, scores of heads by repetition
Part = Literal["recovery", "losses", "weights", "heads"]
PARTS: Final[tuple[Part, ...]] = ("recovery", "losses", "weights", "heads")

Share = Annotated[float, Field(gt=0.0, le=1.0)]

# the query rows that vote where a recipe does not say, see `kvcompress.evict.score_queries`
ESTIMATED_ROWS: Final = 64
ESTIMATED_STRIDE: Final = 32

# calibration prompts that need no data: for the model at hand, those of them that recall, the demo
# model's
BUILTIN: Final = ("builtin", "recall", "notes")
_ROUNDED_SHARES: Final = 0.011  # three thirds may be written as 0.33

_UNITS: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """``8GiB``, ``512 MiB``, ``1048576B`` as a number of bytes.

    Raises:
        ValueError: for anything else; decimal units are refused because they are read both ways.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 8GiB, 512MiB, 64KiB or 1048576B")
    size = float(match[1]) * _UNITS[match[2]]
    if not size < 2**60:
        raise ValueError(f"{text[:40]!r} is more than any machine has")
    return int(size)


class Calibration(StrictModel):
    """Which prompts the profile runs.

    Attributes:
        data: one of `BUILTIN`, a .txt, .jsonl or .parquet file, or the name of a `datasets` data
            set, or ``NAME:CONFIGURATION``; every prompt comes from it.
        mix: in place of `data`, several of these and the share of the prompts that each gives.
        text_column: column or key that holds the text, for everything but .txt.
        split: of a `datasets` data set.
        prompts: number of prompts to run.
        tokens: length to which each prompt is cut; shorter texts are joined.
    """

    data: str = "builtin"
    mix: dict[str, Share] | None = None
    text_column: str = "text"
    split: str = "train"
    prompts: Annotated[int, Field(gt=0, le=2**20)] = 16
    tokens: Annotated[int, Field(ge=64, le=TOKENS_LIMIT)] = 1024
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _sources_are_clear(self) -> Self:
        if self.mix is None:
            return self
        if self.data != "builtin":
            raise ValueError("give data or mix, not both")
        if "" in self.mix:
            raise ValueError("mix: a source has no name")
        if abs(sum(self.mix.values()) - 1) > _ROUNDED_SHARES:
            raise ValueError(f"mix: the shares add up to {sum(self.mix.values()):.4g}, not to 1")
        return self

    def sources(self) -> dict[str, float]:
        """Where prompts come from, and the share of them that each source gives."""
        return {self.data: 1.0} if self.mix is None else dict(self.mix)

    def words(self) -> str:
        """`sources` in one line."""
        if self.mix is None:
            return self.data
        return " + ".join(f"{share:.4g} {source}" for source, share in self.mix.items())


class Keep(StrictModel):
    """Settings that every head shares; see `Plan`.

    A recipe that gives neither `score_rows` nor `score_stride` has the sums of a scorer that adds
    attention up estimated (`ESTIMATED_ROWS`, `ESTIMATED_STRIDE`). ``score_rows: null`` lets all
    rows vote.
    """

    sink_tokens: Slots = 4
    recent_tokens: Annotated[Slots, Field(gt=0)] = 16
    scorer: ScorerName = "lift"
    score_rows: PositiveInt | None = None
    score_stride: Stride | None = None
    pool_tokens: PositiveInt = 1
    per_request: PerRequest | None = None
    positions: Literal["original", "relative"] = "original"
    turn_tokens: NonNegativeInt = 0
    recall: Recall | None = None

    @model_validator(mode="before")
    @classmethod
    def _sums_are_estimated(cls, data: Json) -> Json:
        if not isinstance(data, dict) or "score_rows" in data:
            return data
        if data.get("scorer", "lift") not in tuple(SUMS):
            return data
        stride = data.get("score_stride", ESTIMATED_STRIDE)
        rows = None if stride is None else ESTIMATED_ROWS
        return {**data, "score_rows": rows, "score_stride": stride}

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        check_stride(self.scorer, self.score_rows, self.score_stride)
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Json]:
        return without_unset_stride(handler(self))


class UniformPolicy(StrictModel):
    """The same keep-set in every head."""

    kind: Literal["uniform"]
    head: HeadPlan


class FastGenPolicy(StrictModel):
    """FastGen (arXiv 2310.01801): per head the cheapest keep-set whose recovery is at least T.

    Attributes:
        recovery: T.
        reading: ``mass`` asks for kept attention mass ≥ T, ``l1`` for ‖A−Â‖₁ ≤ 1−T.
        frequent_ratio, local_ratio: r_f and r_l of the paper.
        k_dtype, v_dtype: storage of what is kept.
    """

    kind: Literal["fastgen"]
    recovery: Share = 0.95
    reading: Literal["mass", "l1"] = "mass"
    frequent_ratio: Share = 0.3
    local_ratio: Share = 0.3
    k_dtype: KVDtype = "int8"
    v_dtype: KVDtype = "int8"


class LayersPolicy(StrictModel):
    """A `frequent` budget per layer, the same for all heads of a layer.

    Attributes:
        shape: ``pyramid`` gives early layers more (arXiv 2406.02069), ``funnel`` gives late layers
            more (arXiv 2305.17118), ``calibrated`` takes the one with the smaller predicted loss.
        tokens, ratio: budget of the mean head, exactly one of them.
        beta: the smallest layer's budget is 1/beta of the mean.
        local: window of every head, beyond the recent tokens.
    """

    kind: Literal["layers"]
    shape: Literal["flat", "pyramid", "funnel", "calibrated"] = "pyramid"
    tokens: PositiveInt | None = None
    ratio: Share | None = None
    beta: Annotated[float, Field(ge=1.0)] = 20.0
    local: Budget | None = None
    k_dtype: KVDtype = "model"
    v_dtype: KVDtype = "model"

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError("give exactly one of tokens and ratio")
        return self


class StaticCurvePolicy(StrictModel):
    """A share of the tokens for each head, fixed by the profile's losses; one storage for all.

    Attributes:
        ratio: tokens that the mean head keeps, window included.
        scope: budgets are pooled over a ``layer`` or over the ``model``.
        floor: least share of the mean that a head gets.
    """

    kind: Literal["static_curve"]
    ratio: Share
    scope: Literal["layer", "model"] = "model"
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    k_dtype: KVDtype = "model"
    v_dtype: KVDtype = "model"


class DuoPolicy(StrictModel):
    """Full heads and streaming heads (arXiv 2410.10819), told apart by what they lose.

    Attributes:
        full_share: share of the heads that stay full.
        ranked_by: what puts the full heads first: the ``loss`` that the profile measured, or
            KVzip's scores of a ``repetition`` (arXiv 2505.23416).
        local: window of the streaming heads, beyond sinks and recent tokens.
    """

    kind: Literal["duo"]
    full_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    ranked_by: Literal["loss", "repetition"] = "loss"
    local: Budget | None = None
    k_dtype: KVDtype = "model"
    v_dtype: KVDtype = "model"


class BytesPolicy(StrictModel):
    """Spend a byte target on keep-set, budget and bits of each head where it buys most.

    Attributes:
        keep_ratio: target as a share of the bf16 KV bytes at `context` and `batch`; or
        memory: target for weights, KV cache and one layer of prefill together, like ``8GiB``.
        dtypes: (key, value) storage pairs that the planner may choose from.
        keep_sets: ``full`` only chooses bits, ``local`` full heads and windows, which need no
            scores, ``all`` also chosen tokens.
        fewer_exact: whether the planner may give every head fewer sinks and recent tokens than
            `keep` says. They are uncoded, so they cost most of a small budget.
        budgets: ``from_context`` lets budgets grow with the prompt from `context` tokens on; a
            shorter prompt is granted what `context` is, which the answer to it then fills.
            ``ratio`` lets budgets grow from nothing: less memory for short prompts, at a high
            price where a long answer follows. ``tokens`` fixes them at what `context` grants.
            Relative positions, which a growing budget could outgrow, always have the last.
        weight_schemes: formats that a memory target may choose from for each decoder layer, where
            `weights` is bf16. A plan has at most one of them beside bf16.
    """

    kind: Literal["bytes"]
    keep_ratio: Share | None = None
    memory: str | None = None
    context: PositiveInt = 1024
    batch: PositiveInt = 1
    dtypes: tuple[tuple[KVDtype, KVDtype], ...] = PAIRS
    keep_sets: Literal["all", "full", "local"] = "all"
    fewer_exact: bool = True
    budgets: Literal["from_context", "ratio", "tokens"] = "from_context"
    weight_schemes: tuple[WeightScheme, ...] = (WHOLE, *ROUNDED)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.keep_ratio is None) == (self.memory is None):
            raise ValueError("give exactly one of keep_ratio and memory")
        if self.memory is not None:
            parse_bytes(self.memory)
        if not self.dtypes:
            raise ValueError("dtypes is empty: list at least one [key, value] pair")
        if not self.weight_schemes:
            raise ValueError("weight_schemes is empty: list at least one of bf16, int8 and nf4")
        return self


Policy = Annotated[
    UniformPolicy | FastGenPolicy | LayersPolicy | StaticCurvePolicy | DuoPolicy | BytesPolicy,
    Field(discriminator="kind"),
]


def reads_profile(policy: Policy) -> bool:
    """Whether `policy` reads numbers that hold only for the settings they were measured with."""
    shaped = isinstance(policy, LayersPolicy) and policy.shape != "calibrated"
    return not (shaped or isinstance(policy, UniformPolicy))


class Recipe(StrictModel):
    """Everything that one `kvcompress profile` and `export` need to be repeated."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")] = "default"
    description: str = ""
    calibration: Calibration = Calibration()
    keep: Keep = Keep()
    policy: Policy = FastGenPolicy(kind="fastgen")
    weights: WeightScheme = "bf16"

    @model_validator(mode="after")
    def _recall_drops_nothing(self) -> Self:
        full = isinstance(self.policy, UniformPolicy) and self.policy.head.full
        if self.keep.recall is not None and not full:
            raise ValueError("keep.recall drops nothing: give a uniform policy with full: true")
        return self

    @property
    def parts(self) -> set[Part]:
        """What a profile has to measure for the policy."""
        policy = self.policy
        if not reads_profile(policy):
            return set()
        if isinstance(policy, FastGenPolicy):
            return {"recovery"}
        if isinstance(policy, DuoPolicy) and policy.ranked_by == "repetition":
            return {"heads"}
        counted = isinstance(policy, BytesPolicy) and policy.memory is not None
        return {"losses", "weights"} if counted and self.weights == WHOLE else {"losses"}

    def with_prompts(self, prompts: int) -> Recipe:
        """The same on this number of calibration prompts."""
        calibration = self.calibration.model_copy(update={"prompts": prompts})
        return self.model_copy(update={"calibration": calibration})

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read and check a recipe file.

        Raises:
            RecipeError: with every problem of the file and its key path, in one message.
        """
        path = Path(path)
        try:
            text = read_text(path, YAML_LIMIT_BYTES)
        except NotStrictError as error:
            raise RecipeError(f"{path}: cannot read the recipe ({error})") from None
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """As `load`, from a string."""
        try:
            data, problems = load_yaml(text)
        except NotStrictError as error:
            raise RecipeError(f"{where}: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: expected a mapping of settings at the top level")
        try:
            recipe = cls.model_validate(_tuples(data), strict=True)
        except ValidationError as error:
            raise RecipeError(f"{where}: {'; '.join([*problems, explain(error)])}") from None
        if problems:
            raise RecipeError(f"{where}: {'; '.join(problems)}")
        return recipe


def _tuples(value: Json) -> Json:
    """YAML lists as the tuples that the strict schema wants."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value
