"""What one KV head keeps: its parts, their budgets and its storage. Pure data.

`kvcompress.plan` puts the heads of a model together.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvcompress.storage import STORAGES, KVDtype

# Positions and token counts are 32-bit numbers in the kernels, with room for sums of two.
TOKENS_LIMIT: Final = 2**30
PositiveInt = Annotated[int, Field(gt=0, le=TOKENS_LIMIT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=TOKENS_LIMIT)]
ByteCount = Annotated[int, Field(ge=0, lt=2**60)]


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys, NaN and infinity, and does not coerce."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
        cap: most tokens that the head's parts may hold together, protected spans aside. Where they
            would hold more, the head drops `frequent` tokens first, then its oldest punctuation,
            then its oldest local tokens, then its oldest special tokens. None: special tokens and
            punctuation always find room.
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
        return f"k{STORAGES[self.k_dtype].short}v{STORAGES[self.v_dtype].short}"
