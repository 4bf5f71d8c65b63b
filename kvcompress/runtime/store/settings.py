"""The part of a plan that one layer needs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvcompress.accounting import keeps_classes, keeps_scores, sinks_of
from kvcompress.errors import PlanError
from kvcompress.evict.keep_set_ladder import fastgen_ladder
from kvcompress.evict.scorers import Scorer, scorer
from kvcompress.plan import Budget, FastGenChoice, HeadPlan, Plan, PooledBudget, Threshold
from kvcompress.quant.codec import key_scale
from kvcompress.quant.keystats import KVParams, Rotation, positions_for
from kvcompress.registry import SUMS
from kvcompress.runtime.store.segments import EMPTY, StorageKind
from kvcompress.storage import STORAGES


def needs_whole_prompt(plan: Plan) -> bool:
    """Whether a prompt is held until it ends: its rule or its scorer looks at all of it at once."""
    rule = plan.per_request
    pools = isinstance(rule, PooledBudget) and rule.scope == "model"
    return pools or isinstance(rule, FastGenChoice) or "repeat" in scorer(plan.scorer).needs


class LayerSettings:
    """The part of a plan that one layer needs; shared by every cache and never copied."""

    def __init__(self, plan: Plan, params: KVParams | None, layer: int) -> None:
        self.plan = plan
        self.layer = layer
        self.heads: tuple[HeadPlan, ...] = plan.heads[layer]
        self.sink_tokens = sinks_of(plan, layer)
        self.recent_tokens = plan.recent_tokens
        kind, width = plan.model.kind(layer), plan.model.sliding_windows[layer]
        self.kind = kind
        self.window: int | None = width if kind == "sliding" else None
        self.block: int | None = width if kind == "chunked" else None
        self.readers = plan.model.readers(layer)
        self.scorer: Scorer = scorer(plan.scorer)
        self.sums = plan.scorer in SUMS
        self.uses_classes = any(map(keeps_classes, self.heads))
        self.relative = plan.positions == "relative"
        rule = plan.per_request
        self.chosen_by_head = isinstance(rule, FastGenChoice)
        self.keep_if_above = rule.at_least if isinstance(rule, Threshold) else None
        self.whole_prompt = needs_whole_prompt(plan)
        if self.scorer.across_heads and len(set(self.heads)) > 1:
            raise PlanError(
                f"layer {layer}: the scorer {plan.scorer!r} keeps the same tokens in every head, "
                "and the plan's heads differ; give all of a layer the same keep-set and storage"
            )
        for head in self.heads:
            for dtype, dim in (
                (head.k_dtype, plan.model.head_dim),
                (head.v_dtype, plan.model.v_dim),
            ):
                if dim % STORAGES[dtype].multiple:
                    raise PlanError(
                        f"layer {layer}: {dtype} stores vectors of a multiple of "
                        f"{STORAGES[dtype].multiple} channels, and these have {dim}"
                    )
        tensors = {} if params is None else params.tensors_of(layer)
        self._trained = {name: tensors[name] for name in self.scorer.trained if name in tensors}
        if len(self._trained) < len(self.scorer.trained):
            raise PlanError(
                f"the scorer {plan.scorer!r} was not trained for this model: profile it with a "
                f"recipe whose keep.scorer is {plan.scorer}, and use that profile's constants"
            )
        self.rotation: Rotation | None = None  # for relative positions; the model's forward sets it
        self._params = params
        self._constants: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSettings:
        return self

    @property
    def exact_tokens(self) -> int:
        return self.sink_tokens + self.recent_tokens

    @cached_property
    def groups(self) -> list[tuple[StorageKind, list[int]]]:
        """Heads that share storage, in a fixed order."""
        found: dict[StorageKind, list[int]] = {}
        for index, head in enumerate(self.heads):
            kind = StorageKind(head.k_dtype, head.v_dtype, keeps_scores(head))
            found.setdefault(kind, []).append(index)
        return list(found.items())

    def sees(self, query: Tensor | int, key: Tensor, start: Tensor) -> Tensor | None:
        """Which keys the architecture lets a query see, among those not after it; None is all.

        Args:
            query, key: positions, broadcastable.
            start: position of the row's first real token, broadcastable: aligned blocks of
                tokens are counted from it.
        """
        if self.window is not None:
            return key > query - self.window
        if self.block is not None:
            own, theirs = ((t - start).div(self.block, rounding_mode="floor") for t in (key, query))
            return own == theirs
        return None

    def without_outdated(self, position: Tensor, now: int, start: Tensor) -> Tensor:
        """`position`, −1 for tokens that no query after `now` can see."""
        seen = self.sees(now + 1, position, start)
        return position if seen is None else position.masked_fill(~seen, EMPTY)

    def granted_head(self, head: int, granted: int) -> HeadPlan:
        """The plan of a head with what the plan's rule granted it at a prompt's end.

        Args:
            granted: place in FastGen's chain, or tokens of the `frequent` budget.
        """
        base = self.heads[head]
        if base.frequent is None:
            return base
        if self.chosen_by_head:
            return fastgen_ladder(base.frequent, base.local, base.k_dtype, base.v_dtype)[granted]
        return base.model_copy(update={"frequent": Budget(tokens=granted)})

    def trained(self, device: torch.device) -> dict[str, Tensor]:
        """The scorer's trained tensors of this layer on `device`."""
        if device not in self._on_device:
            self._on_device[device] = {n: t.to(device) for n, t in self._trained.items()}
        return self._on_device[device]

    def positions_for(self, tokens: int) -> int:
        """Positions that the key constants are for where a first prompt has so many tokens."""
        return positions_for(tokens, self.plan.max_position)

    def key_constants(self, device: torch.device, positions: int) -> tuple[Tensor, Tensor]:
        """(centre, scale) that keys are coded with, each ``[Hkv, D]`` float32 on `device`.

        Args:
            positions: how many the constants are for.
        """
        known = (device, positions)
        if known not in self._constants:
            shape = (self.plan.model.kv_heads, self.plan.model.head_dim)
            if self._params is None:
                pair = (torch.zeros(shape), torch.ones(shape))
            else:
                center, scale = self._params.constants(self.layer, positions)
                own = [key_scale(s, h.k_dtype) for s, h in zip(scale, self.heads, strict=True)]
                pair = (center, torch.stack(own))
            self._constants[known] = (pair[0].to(device).float(), pair[1].to(device).float())
        return self._constants[known]
