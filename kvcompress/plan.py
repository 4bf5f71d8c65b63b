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

import math
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvcompress.errors import PlanError

SCHEMA_VERSION: Final = 1

KVDtype = Literal["model", "fp8", "int8", "int4"]
# what a layer keeps: keys and values of all, of a window or of an aligned block of tokens; one MLA
# latent; the keys and values of another layer; the recurrent state of linear attention; nothing
LayerKind = Literal["full", "sliding", "chunked", "latent", "shared", "linear", "none"]
HOLDS_KV: Final = frozenset({"full", "sliding", "chunked", "latent"})
ScorerName = Literal["raw", "mean", "lift", "random", "key_norm"]
DigestName = Literal["minmax", "mean"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys and does not coerce."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Budget(StrictModel):
    """A number of tokens, or a share of the prompt with bounds.

    Exactly one of `tokens` and `ratio` is given.
    """

    tokens: NonNegativeInt | None = None
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    min_tokens: NonNegativeInt = 0
    max_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError("give exactly one of tokens and ratio")
        if self.tokens is not None and (self.min_tokens or self.max_tokens is not None):
            raise ValueError("min_tokens and max_tokens bound a ratio, not a number of tokens")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        return self

    def resolve(self, length_tokens: int) -> int:
        """Tokens that this budget grants a row of `length_tokens` real tokens."""
        if self.tokens is not None:
            return self.tokens
        assert self.ratio is not None
        wanted = max(self.min_tokens, math.ceil(self.ratio * length_tokens))
        return wanted if self.max_tokens is None else min(wanted, self.max_tokens)


class HeadPlan(StrictModel):
    """What one KV head keeps, beyond the plan's sinks and recent tokens, and how it stores it.

    Attributes:
        cap: most tokens that the head's parts may hold together, protected spans aside. Beyond it
            `frequent` tokens go first, then the oldest punctuation, then the oldest local tokens,
            then the oldest special tokens. None: class tokens always find room.
    """

    full: bool = False
    special: bool = False
    punct: bool = False
    frequent: Budget | None = None
    local: Budget | None = None
    cap: PositiveInt | None = None
    k_dtype: KVDtype = "int8"
    v_dtype: KVDtype = "int8"

    @model_validator(mode="after")
    def _full_is_alone(self) -> Self:
        if self.full and (self.special or self.punct or self.frequent or self.local or self.cap):
            raise ValueError("a full head keeps everything: drop its other parts")
        return self

    @property
    def label(self) -> str:
        """Short name, for tables: ``full``, ``special+punct+frequent 30%``, ``sink``."""
        if self.full:
            return "full"
        parts = [name for name in ("special", "punct") if getattr(self, name)]
        for name in ("frequent", "local"):
            budget: Budget | None = getattr(self, name)
            if budget is not None:
                size = f"{budget.ratio:.3g}" if budget.tokens is None else f"{budget.tokens}t"
                parts.append(f"{name} {size}")
        return "+".join(parts) or "sink+recent"

    @property
    def storage(self) -> str:
        """``int8``, or ``k8v4``-like where keys and values differ."""
        if self.k_dtype == self.v_dtype:
            return self.k_dtype
        short = {"model": "16", "fp8": "f8", "int8": "8", "int4": "4"}
        return f"k{short[self.k_dtype]}v{short[self.v_dtype]}"


class Recall(StrictModel):
    """Tokens that leave the device go to host memory, and their best blocks come back for a step.

    A row keeps its sinks, its recent tokens and a window of coded tokens on the device. Older
    coded tokens lie on the host in blocks; a digest of each block and KV head stays on the device.

    Attributes:
        resident: tokens of a row on the device, sinks and recent ones included; rounded down to
            whole blocks of coded tokens, of which at least one stays.
        recall_blocks: blocks that each query row brings back for each KV head.
        block_tokens: tokens of a block, a multiple of 16.
        digest: what ranks the blocks: ``minmax`` holds the smallest and the largest key of each
            channel, ``mean`` the mean key; see `kvcompress.evict.digest`.
    """

    resident: Budget
    recall_blocks: PositiveInt = 16
    block_tokens: Annotated[int, Field(ge=16, le=128, multiple_of=16)] = 16
    digest: DigestName = "minmax"

    def window_blocks(self, length_tokens: int, exact_tokens: int) -> int:
        """Blocks of coded tokens that stay on the device.

        Args:
            length_tokens: real tokens of the row when its last prompt ended.
            exact_tokens: sinks and recent tokens.
        """
        return max(1, (self.resident.resolve(length_tokens) - exact_tokens) // self.block_tokens)

    def host_blocks(self, coded_tokens: int, window_blocks: int) -> int:
        """Blocks that lie on the host: as few as leave the others room in the window."""
        return max(0, -(-coded_tokens // self.block_tokens) - window_blocks)


class ModelShape(StrictModel):
    """The facts of a model that a plan depends on.

    Attributes:
        config_hash: sha256 of the architecture's settings, see `runtime.families.config_hash`.
        kv_heads, head_dim: of the cache; a latent layer has one head, as wide as its latent.
        value_dim: channels of a value where they differ from the key's, as in latent layers, whose
            second tensor is the rotated key part. None: `head_dim`.
        sliding_windows: per layer the architecture's own window in tokens, None where it has none.
        layer_kinds: per layer; empty where every layer is full or sliding.
        kv_sources: per layer the layer whose keys it reads; empty where each reads its own.
        model_dtype_bytes: bytes of one element of the model's own KV cache.
    """

    model_type: str
    config_hash: str
    layers: PositiveInt
    query_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    value_dim: PositiveInt | None = None
    sliding_windows: tuple[PositiveInt | None, ...]
    layer_kinds: tuple[LayerKind, ...] = ()
    kv_sources: tuple[NonNegativeInt, ...] = ()
    model_dtype_bytes: PositiveInt = 2
    max_position: PositiveInt

    @model_validator(mode="after")
    def _one_entry_per_layer(self) -> Self:
        for name in ("sliding_windows", "layer_kinds", "kv_sources"):
            count = len(getattr(self, name))
            if count != self.layers and (count or name == "sliding_windows"):
                raise ValueError(f"{name} needs one entry for each of {self.layers} layers")
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
        """KV heads that the layer itself stores: none where it shares or keeps a state."""
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
        score_rows: only the last so many prompt rows vote at prefill; None is all of them.
        special_ids, punct_ids: token ids of the two classes, bound to `tokenizer_hash`.
        max_position: last position for which the key constants were derived.
        positions: ``original`` keeps the position that each token had; ``relative`` numbers the
            kept tokens of a head anew at every step, so that contexts beyond the trained length
            never show the model a distance that it was not trained on (StreamingLLM, section 3.2).
        turn_tokens: coded tokens that every turn of a conversation keeps in each head before its
            other tokens compete with later turns.
        recall: a tier of host memory, in every layer without a window of its own; None: no tier.
        target: one line that says what the plan was solved for.
        predicted_loss: sum over heads of the profile's loss, None for a plan written by hand.
    """

    schema_version: Literal[1] = 1
    model: ModelShape
    heads: tuple[tuple[HeadPlan, ...], ...]
    sink_tokens: NonNegativeInt = 4
    recent_tokens: PositiveInt = 16
    scorer: ScorerName = "lift"
    score_rows: PositiveInt | None = None
    special_ids: tuple[NonNegativeInt, ...] = ()
    punct_ids: tuple[NonNegativeInt, ...] = ()
    special_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    punct_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    tokenizer_hash: str | None = None
    max_position: PositiveInt
    positions: Literal["original", "relative"] = "original"
    turn_tokens: NonNegativeInt = 0
    recall: Recall | None = None
    target: str = "by hand"
    predicted_loss: float | None = None

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

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_defaults=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse and check.

        Raises:
            PlanError: naming every key that is wrong, or a newer schema.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"{where}: {explain(error)}") from None

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read ``plan.json``, or the one inside a profile or bundle directory."""
        path = Path(path)
        for candidate in (path / "plan.json", path / "kvcompress" / "plan.json"):
            if path.is_dir() and candidate.is_file():
                path = candidate
                break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot read the plan ({error}); give a plan.json") from None
        return cls.from_json(text, str(path))


def uniform(shape: ModelShape, head: HeadPlan, **settings: object) -> Plan:
    """The same `head` everywhere; `settings` are further fields of `Plan`."""
    rows = tuple((head,) * shape.heads_of(layer) for layer in range(shape.layers))
    settings.setdefault("max_position", shape.max_position)
    return Plan(model=shape, heads=rows, **settings)  # type: ignore[arg-type]


def explain(error: ValidationError) -> str:
    """All problems of a pydantic error in one line, each with its key path."""
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in item["loc"]).lstrip(".")
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key"
        got = item.get("input")
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool) else ""
        problems.append(f"{path or 'top level'}: {text}{shown}")
    return "; ".join(problems)
