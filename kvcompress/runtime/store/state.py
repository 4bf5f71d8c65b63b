"""What one layer of the compressed cache holds, and how it grows, repeats and reorders."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from kvcompress.accounting import (
    GROW_TOKENS,
    capacity_tokens,
    keeps_classes,
    keeps_scores,
    sinks_of,
)
from kvcompress.errors import PlanError
from kvcompress.evict.keep_set_ladder import fastgen_ladder
from kvcompress.evict.keepset import HeadRules, class_mask
from kvcompress.evict.scorers import Scorer, scorer
from kvcompress.plan import Budget, FastGenChoice, HeadPlan, Plan, PooledBudget, Threshold
from kvcompress.quant.codec import key_scale
from kvcompress.quant.keystats import KVParams, Rotation, positions_for
from kvcompress.registry import SUMS
from kvcompress.runtime.store.segments import EMPTY, Group, SegmentStore, StorageKind
from kvcompress.runtime.torch_modes import leaving_plain_tensors
from kvcompress.storage import STORAGES

MOST_TOKENS: Final = 1 << 31  # positions are int32


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


@dataclass(slots=True)
class LayerState:
    """Tensors and host counters of one layer.

    Attributes:
        exact_k, exact_v: ``[B, Hkv, sinks + recent, D]`` model dtype.
        exact_position: ``[B, sinks + recent]`` int32, −1 where empty.
        exact_class: ``[B, sinks + recent]`` uint8 class flags, or None.
        start: ``[B]`` int32 position of the row's first real token, −1 before it.
        row_seen: real tokens of each row so far.
        budget_length: `row_seen` when the last prompt ended; ratios resolve against it.
        class_counts: per row, coded tokens by class flags (1 special, 2 punctuation, 3 both).
        first_vote: first position whose query votes for `frequent` tokens.
        spans: per row the protected tokens, numbered from the row's first real token.
        turn_starts: position at which each turn of the conversation began.
        positions: that the key constants are for.
        granted: ``granted[row][head]``, what the plan's rule decided at the end of the prompt, see
            `LayerSettings.granted_head`; empty before that, and without a rule.
    """

    settings: LayerSettings
    exact_k: Tensor
    exact_v: Tensor
    exact_position: Tensor
    exact_class: Tensor | None
    start: Tensor
    groups: list[Group]
    positions: int
    row_seen: list[int]
    budget_length: list[int]
    class_counts: list[list[int]] = field(default_factory=list)
    first_vote: int = 0
    spans: list[tuple[range, ...]] = field(default_factory=list)
    turn_starts: list[int] = field(default_factory=list)
    granted: list[list[int]] = field(default_factory=list)

    @staticmethod
    def empty(
        settings: LayerSettings, key: Tensor, value: Tensor, spans: list[tuple[range, ...]]
    ) -> LayerState:
        """For a first prompt with keys ``[B, Hkv, T, D]`` and values ``[B, Hkv, T, Dv]``."""
        batch, heads, tokens, dim = key.shape
        device, exact = key.device, settings.exact_tokens
        value_dim = value.shape[-1]

        groups = []
        for kind, members in settings.groups:
            store = SegmentStore(
                kind, dim, value_dim, key.dtype, device, [[0] * len(members)] * batch
            )
            plans = [settings.heads[h] for h in members]
            scores = torch.zeros(batch, len(members), settings.recent_tokens, device=device)
            groups.append(
                Group(
                    members,
                    torch.tensor(members, device=device),
                    HeadRules.of(plans, device),
                    store,
                    torch.zeros(batch, len(members), dtype=torch.int32, device=device),
                    scores if kind.scored else None,
                )
            )
        position = torch.full((batch, exact), EMPTY, dtype=torch.int32, device=device)
        flags = torch.zeros(batch, exact, dtype=torch.uint8, device=device)
        return LayerState(
            settings,
            key.new_zeros(batch, heads, exact, dim),
            key.new_zeros(batch, heads, exact, value_dim),
            position,
            flags if settings.uses_classes else None,
            torch.full((batch,), EMPTY, dtype=torch.int32, device=device),
            groups,
            settings.positions_for(tokens),
            [0] * batch,
            [0] * batch,
            [[0, 0, 0, 0] for _ in range(batch)],
            spans=spans,
        )

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    @property
    def recent(self) -> slice:
        """The recent tokens' place among the exact slots."""
        return slice(self.settings.sink_tokens, None)

    def key_constants(self) -> tuple[Tensor, Tensor]:
        """(centre, scale) that keys are coded with, each ``[Hkv, D]`` float32."""
        return self.settings.key_constants(self.start.device, self.positions)

    def rows(self) -> Tensor:
        """Batch rows ``[B]``, as an index."""
        return torch.arange(self.batch, device=self.start.device)

    def oldest_recent(self) -> Tensor:
        """``[B]`` place among the exact slots where the next decoded token goes."""
        return self.exact_position[:, self.recent].argmin(1) + self.settings.sink_tokens

    def tensors(self) -> list[Tensor]:
        """Every tensor that grows with the batch or the context."""
        held = [self.exact_k, self.exact_v, self.exact_position, self.start]
        held += [] if self.exact_class is None else [self.exact_class]
        for group in self.groups:
            held += [group.windows, *group.store.tensors()]
            held += [] if group.recent_score is None else [group.recent_score]
        return held

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def head(self, row: int, head: int) -> HeadPlan:
        """The plan of a row's head."""
        if not self.granted:
            return self.settings.heads[head]
        return self.settings.granted_head(head, self.granted[row][head])

    def grant(self, granted: list[list[int]]) -> None:
        """Every row's heads from now on, see `granted`."""
        self.granted = granted
        if self.settings.chosen_by_head and granted:
            for group in self.groups:
                rows = [[self.head(row, h) for h in group.heads] for row in range(self.batch)]
                group.rules = HeadRules.of_rows(rows, self.start.device)

    def capacities(self, group: Group) -> list[list[int]]:
        """Slots that each (row, head) of `group` should have now."""
        settings = self.settings
        result = []
        for row in range(self.batch):
            counts = self.class_counts[row]
            line = []
            for h in group.heads:
                head = self.head(row, h)
                mask = class_mask(head)
                classes = sum(counts[flags] for flags in (1, 2, 3) if flags & mask)
                line.append(
                    capacity_tokens(
                        settings.plan,
                        settings.layer,
                        head,
                        self.row_seen[row],
                        self.budget_length[row],
                        classes,
                        self.spans[row],
                    )
                )
            result.append(line)
        return result

    def grow(self, leaving_flags: list[int]) -> None:
        """Make room where a segment's capacity steps up: a block of tokens, a class token, a span.

        Args:
            leaving_flags: per row, class flags of the token that leaves the recent ones; 0 for
                none.
        """
        exact = self.settings.exact_tokens
        steps = any((seen - exact) % GROW_TOKENS == 1 for seen in self.row_seen) or any(self.spans)
        for row, flags in enumerate(leaving_flags):
            if flags:
                self.class_counts[row][flags] += 1
                steps = True
        if steps:
            self.relayout()

    @leaving_plain_tensors
    def relayout(self) -> None:
        """Give every segment the slots that it should have now."""
        for group in self.groups:
            capacities = self.capacities(group)
            if capacities != group.store.capacities:
                group.store.relayout(capacities)

    def span_bounds(self) -> Tensor | None:
        """``[B, spans, 2]`` first and last + 1 of each row's protected spans; None if no row has
        one."""
        longest = max(map(len, self.spans))
        if not longest:
            return None
        table = [
            [[s.start, s.stop] for s in spans] + [[0, 0]] * (longest - len(spans))
            for spans in self.spans
        ]
        return torch.tensor(table, device=self.start.device)

    def turn_of(self, position: Tensor) -> Tensor:
        """Number of the turn, from 0, in which tokens came."""
        starts = torch.tensor(self.turn_starts, device=position.device)
        return torch.searchsorted(starts, position.contiguous(), right=True) - 1

    def resolve_windows(self) -> None:
        """Local windows for the current `budget_length` of each row."""
        for group in self.groups:
            table = self.windows_of(group)
            group.windows = torch.tensor(table, dtype=torch.int32, device=self.start.device)

    def windows_of(self, group: Group) -> list[list[int]]:
        """Local windows in tokens, of each (row, head)."""
        rows = [[self.head(row, h) for h in group.heads] for row in range(self.batch)]
        return [
            [plan.local.resolve(length) if plan.local else 0 for plan in plans]
            for plans, length in zip(rows, self.budget_length, strict=True)
        ]

    def select_rows(self, rows: list[int]) -> None:
        """Row b becomes a copy of old row ``rows[b]``; for beams, repeats and selections."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.start.device)
        self.exact_k, self.exact_v = self.exact_k[index], self.exact_v[index]
        self.exact_position, self.start = self.exact_position[index], self.start[index]
        if self.exact_class is not None:
            self.exact_class = self.exact_class[index]
        for group in self.groups:
            group.windows = group.windows[index]
            if group.recent_score is not None:
                group.recent_score = group.recent_score[index]
            capacities = [group.store.capacities[row] for row in rows]
            group.store.relayout(capacities, rows)
        self.row_seen = [self.row_seen[row] for row in rows]
        self.budget_length = [self.budget_length[row] for row in rows]
        self.class_counts = [list(self.class_counts[row]) for row in rows]
        self.spans = [self.spans[row] for row in rows]
        self.grant([list(self.granted[row]) for row in rows] if self.granted else [])
