"""The plan: for every layer and KV head what is kept and in how many bits. Pure data, JSON on disk.

Kept tokens of a head are the union of
  - the first `sink_tokens` real tokens of the row (every head, model dtype),
  - the newest `recent_tokens` tokens (every head, model dtype),
  - special tokens and punctuation, where the head asks for them,
  - `local`: the newest tokens up to a budget, beyond the recent ones in codes,
  - `frequent`: the best of the rest under the plan's scorer, up to a budget,
or everything (`full`). Growing a budget or adding a part only ever adds tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from kvcompress.errors import PlanError
from kvcompress.head_plan import (
    Budget,
    ByteCount,
    HeadPlan,
    KVDtype,
    NonNegativeInt,
    PositiveInt,
    StrictModel,
)
from kvcompress.registry import SUMS, known_scorer
from kvcompress.rules import (
    DigestName,
    FastGenChoice,
    PerRequest,
    PooledBudget,
    Recall,
    Threshold,
)
from kvcompress.strict import Json, NotStrictError, load_json, read_text, shown

__all__ = [
    "Budget",
    "ByteCount",
    "DigestName",
    "FastGenChoice",
    "HeadPlan",
    "KVDtype",
    "ModelShape",
    "NonNegativeInt",
    "PerRequest",
    "Plan",
    "PooledBudget",
    "PositiveInt",
    "Recall",
    "StrictModel",
    "Threshold",
    "WeightScheme",
    "explain",
    "parsed",
    "uniform",
]

Model = TypeVar("Model", bound=StrictModel)

_PROBLEMS: Final = 20  # that one message names
_FILE_BYTES: Final = 2**26

# A layer stores keys and values of all tokens (full), of the newest ones (sliding) or of an aligned
# block (chunked); one MLA latent for each token; nothing, where it reads another layer's keys
# (shared); the recurrent state of linear attention; or nothing at all.
LayerKind = Literal["full", "sliding", "chunked", "latent", "shared", "linear", "none"]
HOLDS_KV: Final = frozenset({"full", "sliding", "chunked", "latent"})
ScorerName = Annotated[str, AfterValidator(known_scorer)]
Stride = Annotated[int, Field(ge=2, le=2**20)]
# Each head holds its sinks and recent tokens in arrays that are made at once, for every row.
Slots = Annotated[int, Field(ge=0, le=2**15)]
# Larger than any model's. A file that says more is damaged, and believing it would take gigabytes.
Layers = Annotated[int, Field(gt=0, le=2**12)]
Heads = Annotated[int, Field(gt=0, le=2**12)]
Channels = Annotated[int, Field(gt=0, le=2**14)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=2**20)]
Text = Annotated[str, Field(max_length=2**12)]
WeightScheme = Literal["bf16", "int8", "nf4"]
WHOLE: Final[WeightScheme] = "bf16"
ROUNDED: Final[tuple[WeightScheme, ...]] = tuple(s for s in get_args(WeightScheme) if s != WHOLE)


class ModelShape(StrictModel):
    """The facts of a model that a plan depends on.

    Attributes:
        config_hash: sha256 of the architecture's settings, see `model.families.config_hash`.
        kv_heads, head_dim: of the cache; a latent layer has one head, as wide as its latent.
        value_dim: channels of a value; None is `head_dim`. They differ in latent layers, which
            store the rotated part of their keys in the place of values.
        sliding_windows: per layer the architecture's own window in tokens, None where it has none.
        layer_kinds: per layer; empty where every layer is full or sliding.
        kv_sources: per layer the layer whose keys it reads; empty where each reads its own.
        model_dtype_bytes: bytes of one element of the model's own KV cache.
    """

    model_type: Text
    config_hash: Text
    layers: Layers
    query_heads: Heads
    kv_heads: Heads
    head_dim: Channels
    value_dim: Channels | None = None
    sliding_windows: tuple[PositiveInt | None, ...]
    layer_kinds: tuple[LayerKind, ...] = ()
    kv_sources: tuple[NonNegativeInt, ...] = ()
    model_dtype_bytes: Annotated[int, Field(ge=1, le=8)] = 2
    max_position: PositiveInt

    @model_validator(mode="after")
    def _one_entry_per_layer(self) -> Self:
        for name in ("sliding_windows", "layer_kinds", "kv_sources"):
            count = len(getattr(self, name))
            if count != self.layers and (count or name == "sliding_windows"):
                raise ValueError(f"{name} needs one entry for each of {self.layers} layers")
        if any(source >= self.layers for source in self.kv_sources):
            raise ValueError(f"kv_sources names a layer beyond the last of {self.layers}")
        return self

    @property
    def v_dim(self) -> int:
        """Channels of one value."""
        return self.value_dim or self.head_dim

    def kind(self, layer: int) -> LayerKind:
        if self.layer_kinds:
            return self.layer_kinds[layer]
        return "full" if self.sliding_windows[layer] is None else "sliding"

    def heads_of(self, layer: int) -> int:
        """KV heads that the layer itself stores: none where it reads another layer's keys, or
        keeps a recurrent state."""
        return self.kv_heads if self.kind(layer) in HOLDS_KV else 0

    def readers(self, layer: int) -> tuple[int, ...]:
        """Layers that read this layer's keys, itself first."""
        others = (i for i, source in enumerate(self.kv_sources) if source == layer and i != layer)
        return (layer, *others)

    def bf16_kv_bytes(self, context_tokens: int, batch: int) -> int:
        """Bytes of the uncompressed cache of a 16-bit model, the unit of every ratio we print."""
        held = (
            self.heads_of(layer) * min(context_tokens, window or context_tokens)
            for layer, window in enumerate(self.sliding_windows)
        )
        return batch * (self.head_dim + self.v_dim) * 2 * sum(held)


class Plan(StrictModel):
    """See the module docstring.

    Attributes:
        heads: ``heads[layer][kv_head]``.
        scorer: ranks `frequent` tokens; see `kvcompress.evict.scorers`.
        score_rows: at the end of a prompt only its last `score_rows` query rows vote on which
            tokens stay; None lets all of them vote.
        score_stride: s estimates the sums over all rows instead of computing them. Every row votes
            for its newest `score_rows` keys; for the other keys one row in s votes, and its vote
            counts s times. See `kvcompress.evict.score_queries`. None estimates nothing.
        special_ids, punct_ids: token ids of the two classes, bound to `tokenizer_hash`.
        max_position: last position for which the key constants were derived.
        positions: ``original`` keeps the position that each token had; ``relative`` numbers the
            kept tokens of a head anew at every step, so that contexts beyond the trained length
            never show the model a distance that it was not trained on (StreamingLLM, section 3.2).
        pool_tokens: odd width of the window over which scores of a prompt's neighbouring tokens are
            averaged (SnapKV, arXiv 2404.14469, section 4.2); 1 leaves them alone.
        per_request: the rule that decides for each row when its prompt ends; None has no rule.
            Under `FastGenChoice` every head's keep-set is the largest of FastGen's ladder but full.
        repeat_ids: tokens that ask the model to repeat what it read, for a scorer that needs it.
        turn_tokens: coded tokens that every turn of a conversation keeps in each head before its
            other tokens compete with later turns.
        recall: a tier of host memory, in every layer without a window of its own; None: no tier.
        target: one line that says what the plan was solved for.
        predicted_loss: KL to the full cache that the profile expects on text, in nats per token.
            None where the profile cannot tell.
        predicted_recall_loss: the same where the text asks for what stands far above.
        weights: format of the linear layers of each decoder layer; empty where all have the
            format that the bundle names.
    """

    schema_version: Literal[1] = 1
    model: ModelShape
    heads: tuple[tuple[HeadPlan, ...], ...]
    sink_tokens: Slots = 4
    recent_tokens: Annotated[Slots, Field(gt=0)] = 16
    scorer: ScorerName = "lift"
    score_rows: PositiveInt | None = None
    score_stride: Stride | None = None
    pool_tokens: PositiveInt = 1
    per_request: PerRequest | None = None
    repeat_ids: TokenIds = ()
    special_ids: TokenIds = ()
    punct_ids: TokenIds = ()
    special_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    punct_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    tokenizer_hash: Text | None = None
    max_position: PositiveInt
    positions: Literal["original", "relative"] = "original"
    turn_tokens: NonNegativeInt = 0
    recall: Recall | None = None
    target: Text = "by hand"
    predicted_loss: float | None = None
    predicted_recall_loss: float | None = None
    weights: tuple[WeightScheme, ...] = ()

    @model_validator(mode="after")
    def _covers_the_model(self) -> Self:
        shape = self.model
        if len(self.heads) != shape.layers:
            raise ValueError(f"{len(self.heads)} layers of heads, the model has {shape.layers}")
        for index, layer in enumerate(self.heads):
            if len(layer) != shape.heads_of(index):
                raise ValueError(
                    f"heads[{index}] has {len(layer)} heads, the model stores "
                    f"{shape.heads_of(index)} KV heads in that layer ({shape.kind(index)})"
                )
        if self.weights and len(self.weights) != shape.layers:
            raise ValueError(f"weights has {len(self.weights)} entries for {shape.layers} layers")
        if len({*self.weights} - {"bf16"}) > 1:
            raise ValueError("weights mixes int8 and nf4: one bundle holds one of them beside bf16")
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        check_stride(self.scorer, self.score_rows, self.score_stride)
        if self.pool_tokens % 2 == 0:
            raise ValueError(f"pool_tokens {self.pool_tokens} is even: a window has a middle")
        heads = [head for layer in self.heads for head in layer]
        if isinstance(self.per_request, FastGenChoice):
            if not all(h.special and h.punct and h.frequent and h.local for h in heads):
                raise ValueError(
                    "per_request fastgen chooses in every head among FastGen's keep-sets: give "
                    "each head special, punct, frequent and local"
                )
            if self.positions == "relative":
                raise ValueError("per_request fastgen may keep everything, relative positions not")
        elif self.per_request is not None and not any(head.frequent for head in heads):
            raise ValueError("per_request shares out frequent budgets, and no head has one")
        return self

    @model_validator(mode="after")
    def _recall_fits(self) -> Self:
        if self.recall is None:
            return self
        kinds = {self.model.kind(layer) for layer in range(self.model.layers)}
        reasons = {
            "heads that are not full (a recall tier drops nothing: give every head full: true)": (
                not all(head.full for row in self.heads for head in row)
            ),
            "relative positions": self.positions != "original",
            "turn_tokens": self.turn_tokens > 0,
            "latent layers": "latent" in kinds,
            "layers that share keys": "shared" in kinds,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"recall does not go with {reason}")
        return self

    def recalls(self, layer: int) -> bool:
        """Whether the layer has a recall tier; a layer with a window of its own needs none."""
        return self.recall is not None and self.model.kind(layer) == "full"

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Json]:
        return without_unset_stride(handler(self))

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_defaults=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse and check.

        Raises:
            PlanError: naming every key that is wrong, or a newer schema.
        """
        try:
            return parsed(cls, text)
        except NotStrictError as error:
            raise PlanError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read ``plan.json``, or the one inside a profile or bundle directory."""
        path = Path(path)
        for candidate in (path / "plan.json", path / "kvcompress" / "plan.json"):
            if path.is_dir() and candidate.is_file():
                path = candidate
                break
        try:
            text = read_text(path, _FILE_BYTES)
        except NotStrictError as error:
            raise PlanError(f"{path}: cannot read the plan ({error}); give a plan.json") from None
        return cls.from_json(text, str(path))


def uniform(shape: ModelShape, head: HeadPlan, **settings: object) -> Plan:
    """The same `head` everywhere; `settings` are further fields of `Plan`."""
    rows = tuple((head,) * shape.heads_of(layer) for layer in range(shape.layers))
    settings.setdefault("max_position", shape.max_position)
    return Plan(model=shape, heads=rows, **settings)  # type: ignore[arg-type]


def check_stride(scorer: str, rows: int | None, stride: int | None) -> None:
    """Refuse an estimate of sums where there is nothing to estimate.

    Raises:
        ValueError: naming what is missing.
    """
    if stride is not None and rows is None:
        raise ValueError(
            f"score_stride {stride} without score_rows: say how many newest keys every row votes "
            "for, or drop score_stride, so that all rows vote"
        )
    if stride is not None and scorer not in SUMS:
        raise ValueError(
            f"score_stride {stride} estimates sums of attention, and {scorer} adds none up: leave "
            f"it out, or choose among {', '.join(sorted(SUMS))}"
        )


def without_unset_stride(data: dict[str, Json]) -> dict[str, Json]:
    """`data` without a `score_stride` of None. A plan that does not use it is written as it was
    before there was one, so that files and caches that hold a hash of its text stay valid."""
    if data.get("score_stride", 0) is None:
        del data["score_stride"]
    return data


def parsed(kind: type[Model], text: str | bytes) -> Model:
    """The value of this kind that a JSON document holds.

    Raises:
        NotStrictError: in one line, naming every key that is wrong.
    """
    load_json(text)  # pydantic's own reader takes NaN, and a key twice
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise NotStrictError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """The problems of a pydantic error in one line, each with its key path."""
    problems = []
    items = error.errors(include_url=False, include_context=False)
    for item in items[:_PROBLEMS]:
        parts = (f"[{p}]" if isinstance(p, int) else f".{shown(p)}" for p in item["loc"])
        path = "".join(parts).lstrip(".")
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key"
        got = item.get("input")
        value = f" (got {shown(repr(got))})" if isinstance(got, str | int | float | bool) else ""
        problems.append(f"{path or 'top level'}: {shown(text, 400)}{value}")
    if len(items) > _PROBLEMS:
        problems.append(f"and {len(items) - _PROBLEMS} more")
    return "; ".join(problems)
