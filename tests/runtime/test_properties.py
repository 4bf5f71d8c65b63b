"""One layer under random plans and random sequences of calls, against what always holds.

A run prints its seed; `pytest --hypothesis-seed=…` repeats it, and failures print the case.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompress import accounting
from kvcompress.evict.keepset import class_mask
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan
from kvcompress.registry import SUMS
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.store.rules import broken
from kvcompress.runtime.store.state import LayerSettings
from kvcompress.storage import STORAGES

CASES = 2000
STEADY = ("random", "key_norm")  # scores that do not depend on what was kept before


@dataclass
class Case:
    """A plan of one layer, and the calls that a cache gets."""

    plan: Plan
    batch: int
    groups: int
    spans: tuple[range, ...]
    calls: list[tuple]
    seed: int
    hold: bool = False


BUDGETS = st.none() | st.one_of(
    st.integers(0, 12).map(lambda n: Budget(tokens=n)),
    st.tuples(st.floats(0.05, 1.0), st.integers(0, 3)).map(
        lambda pair: Budget(ratio=pair[0], min_tokens=pair[1])
    ),
)
STORAGE = st.sampled_from(list(STORAGES))
FULL = st.builds(HeadPlan, full=st.just(True), k_dtype=STORAGE, v_dtype=STORAGE)
SPARSE = st.builds(
    HeadPlan,
    special=st.booleans(),
    punct=st.booleans(),
    frequent=BUDGETS,
    local=BUDGETS,
    cap=st.none() | st.integers(1, 14),
    k_dtype=STORAGE,
    v_dtype=STORAGE,
)
HEADS = st.integers(0, 4).flatmap(lambda n: SPARSE if n else FULL)
KINDS = st.sampled_from(["full", "full", "sliding", "chunked"])
SCORERS = st.sampled_from(["raw", "mean", "lift", "random", "key_norm"])
ROWS = st.none() | st.integers(1, 8)
STRIDES = st.none() | st.integers(2, 9)


@st.composite
def plans(draw):
    kv_heads = draw(st.integers(1, 3))
    kind = draw(KINDS)
    width = None if kind == "full" else draw(st.integers(3, 24))
    shape = ModelShape(
        model_type="tiny", config_hash="0", layers=1, query_heads=kv_heads, kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 24])), sliding_windows=(width,), layer_kinds=(kind,),
        model_dtype_bytes=4, max_position=512,
    )  # fmt: skip
    scorer = draw(SCORERS)
    rows = draw(ROWS)
    estimates = rows is not None and scorer in SUMS
    return Plan(
        model=shape,
        heads=(tuple(draw(HEADS) for _ in range(kv_heads)),),
        sink_tokens=draw(st.integers(0, 3)),
        recent_tokens=draw(st.integers(1, 6)),
        scorer=scorer,
        score_rows=rows,
        score_stride=draw(STRIDES) if estimates else None,
        special_ids=(1,),
        punct_ids=(2,),
        turn_tokens=draw(st.sampled_from([0, 0, 2, 5])),
        max_position=512,
    )


CALL = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 9)),
    st.tuples(st.just("turn"), st.integers(2, 16)),
    st.tuples(st.just("draft"), st.integers(1, 6), st.integers(0, 6)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("copy")),
)
CALLS = st.lists(CALL, max_size=5)
STARTS = st.lists(st.integers(0, 24), max_size=4, unique=True)


@st.composite
def cases(draw):
    starts = sorted(draw(STARTS))
    return Case(
        plan=draw(plans()),
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 2)),
        spans=tuple(range(a, b) for a, b in zip(starts[::2], starts[1::2], strict=False)),
        calls=[("prompt", draw(st.integers(1, 40)))] + draw(CALLS),
        seed=draw(st.integers(0, 2**16)),
        hold=draw(st.integers(0, 3)) == 0,
    )


@dataclass
class Driver:
    """A layer, what it was fed, and which tokens of each row were real and of which class."""

    case: Case
    layer: CompressedLayer
    generator: torch.Generator
    keys: list[torch.Tensor] = field(default_factory=list)  # each [B, Hkv, T, D]
    values: list[torch.Tensor] = field(default_factory=list)
    flags: list[torch.Tensor] = field(default_factory=list)  # each [B, T]
    real: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def of(case: Case, plan: Plan | None = None) -> Driver:
        settings_ = LayerSettings(plan or case.plan, None, 0)
        layer = CompressedLayer(settings_, case.spans, case.hold)
        return Driver(case, layer, torch.Generator().manual_seed(case.seed))

    @property
    def seen(self) -> int:
        return sum(k.shape[2] for k in self.keys)

    def feed(self, length: int, pads: list[int] | None = None) -> torch.Tensor:
        """Random tokens; gives the output, and checks it where nothing was coded."""
        plan, rand = self.case.plan, self.generator
        batch = self.layer.state.batch if self.layer.state is not None else self.case.batch
        heads_, dim = plan.model.kv_heads, plan.model.head_dim
        q = torch.randn(batch, heads_ * self.case.groups, length, dim, generator=rand)
        k = torch.randn(batch, heads_, length, dim, generator=rand)
        v = torch.randn(batch, heads_, length, dim, generator=rand)
        flags = torch.randint(0, 9, (batch, length), generator=rand)
        flags = torch.where(flags > 3, 0, flags).to(torch.uint8)
        real = torch.ones(batch, length, dtype=torch.bool)
        mask = None
        if pads is not None and any(pads):
            for row, count in enumerate(pads):
                real[row, :count] = False
            mask = real[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
            mask = mask & real[:, None, :, None]
        settled = self.layer.state is not None and not self.layer.has_pending
        before = self.kept() if settled else None
        self.keys.append(k)
        self.values.append(v)
        self.flags.append(flags)
        self.real.append(real)
        self.layer.announce(ForwardInfo(flags=flags, in_prompt=False))
        self.layer.update(k, v)
        out = self.layer.forward(AttentionCall(q, k, v, mask, dim**-0.5))
        if self.exact and length == 1 and before is not None:
            self.check_output(q, out, before)
        return out

    @property
    def exact(self) -> bool:
        return all(h.k_dtype == h.v_dtype == "model" for row in self.case.plan.heads for h in row)

    def check_output(self, q: torch.Tensor, out: torch.Tensor, before: list) -> None:
        """One query over exactly the kept tokens and itself, float64."""
        keys, values = torch.cat(self.keys, 2).double(), torch.cat(self.values, 2).double()
        now, groups = self.seen - 1, self.case.groups
        for row, kept in enumerate(before):
            start = self.starts()[row]
            for head, tokens in enumerate(kept):
                tokens = [p for p in tokens if self.in_sight(p, now, start)] + [now]
                for g in range(groups):
                    query = q[row, head * groups + g, 0].double()
                    logits = keys[row, head, tokens] @ query * q.shape[-1] ** -0.5
                    wanted = logits.softmax(-1) @ values[row, head, tokens]
                    got = out[row, 0, head * groups + g].double()
                    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)

    def in_sight(self, key: int, query: int, start: int) -> bool:
        shape = self.case.plan.model
        width = shape.sliding_windows[0]
        if shape.kind(0) == "sliding":
            return key > query - width
        if shape.kind(0) == "chunked":
            return (key - start) // width == (query - start) // width
        return True

    def starts(self) -> list[int]:
        real = torch.cat(self.real, 1)
        return [int(row.int().argmax()) if bool(row.any()) else 0 for row in real]

    def kept(self) -> list[list[list[int]]]:
        """Positions of every row and head, coded ones in the order of their slots."""
        state, found = self.layer.state, []
        for row in range(state.batch):
            exact = [p for p in state.exact_position[row].tolist() if p >= 0]
            lines: list[list[int]] = [[] for _ in range(len(state.settings.heads))]
            for group in state.groups:
                for index, head in enumerate(group.heads):
                    lines[head] = exact + [p for p in self.coded(group, row, index) if p >= 0]
            found.append(lines)
        return found

    @staticmethod
    def coded(group, row: int, index: int) -> list[int]:
        start, size = group.store.starts[row][index], group.store.capacities[row][index]
        return group.store.position[start : start + size].tolist()

    # ---- what always holds
    def check(self) -> None:
        state, plan = self.layer.state, self.case.plan
        real, flags = torch.cat(self.real, 1), torch.cat(self.flags, 1)
        assert self.layer.get_seq_length() == self.seen
        if self.layer.has_pending:
            return
        total = accounting.layer_shared_bytes(plan, 0, state.batch)
        starts, all_flags = self.starts(), flags.tolist()
        for row, kept in enumerate(self.kept()):
            numbered = real[row].nonzero()[:, 0].tolist()
            seen, places = len(numbered), set(numbered)
            assert state.row_seen[row] == seen
            sinks = accounting.sinks_of(plan, 0)
            coded_region = numbered[sinks : max(sinks, seen - plan.recent_tokens)]
            newest = numbered[-plan.recent_tokens :]
            pinned = {
                p
                for p in coded_region
                if any(p - starts[row] in s for s in self.case.spans)
                and self.in_sight(p, self.seen, starts[row])
            }
            for head, tokens in enumerate(kept):
                assert len(tokens) == len(set(tokens)), "a token is stored twice"
                assert places >= set(tokens), "padding is stored"
                assert set(tokens) >= set(numbered[:sinks]) | set(newest)
                assert set(tokens) >= pinned, "a protected token is gone"
                head_plan = plan.heads[0][head]
                mask = class_mask(head_plan)
                classes = sum(bool(all_flags[row][p] & mask) for p in coded_region)
                room = accounting.capacity_tokens(
                    plan, 0, head_plan, seen, state.budget_length[row], classes, self.case.spans
                )
                self.check_count(row, head, room, len(coded_region), tokens)
                total += accounting.row_head_bytes(
                    plan, 0, head_plan, seen, state.budget_length[row], classes, self.case.spans
                )
        assert self.layer.nbytes() == state.nbytes() == total, "bytes differ from the accounting"
        assert broken(state, self.layer.seen) is None, "what a saved cache is refused for"

    def check_count(self, row: int, head: int, room: int, region: int, tokens: list[int]) -> None:
        group = next(g for g in self.layer.state.groups if head in g.heads)
        assert group.store.capacities[row][group.heads.index(head)] == room
        plan, head_plan = self.case.plan, self.case.plan.heads[0][head]
        held = len(tokens) - len([p for p in self.layer.state.exact_position[row] if p >= 0])
        assert held <= room
        if head_plan.full and plan.model.kind(0) == "full":
            assert held == region
        budgets_ = [b for b in (head_plan.frequent, head_plan.local) if b is not None]
        steady = all(b.tokens is not None for b in budgets_) and not class_mask(head_plan)
        if steady and budgets_ and plan.model.kind(0) == "full" and not self.case.spans:
            assert held == min(room, region), "room is left unused"

    def run(self, call: tuple) -> None:
        name, *args = call
        if name == "prompt":
            rows = range(self.case.batch)
            pads = [min(args[0] - 1, (self.case.seed >> row) % 5) for row in rows]
            self.feed(args[0], [0] * len(rows) if self.case.seed % 3 else pads)
        elif name == "turn":
            self.feed(args[0])
            for layer_kept in self.slots_after_commit():
                assert layer_kept == sorted(layer_kept), "a fresh layout is not in order"
        elif name == "decode":
            for _ in range(args[0] - 1):
                self.feed(1)
                self.check()
            self.feed(1)
        elif name == "draft":
            self.draft(args[0], min(args))
        elif name == "select":
            batch = self.layer.state.batch
            rows = [(args[0] + i) % batch for i in range(1 + args[0] % 3)]
            self.layer.batch_select_indices(torch.tensor(rows))
            for name_ in ("keys", "values", "flags", "real"):
                setattr(self, name_, [t[rows] for t in getattr(self, name_)])
        elif name == "copy":
            kept = self.kept()
            self.layer = copy.deepcopy(self.layer)
            assert self.kept() == kept
        self.check()

    def slots_after_commit(self) -> list[list[int]]:
        if self.layer.has_pending:
            return []
        state = self.layer.state
        return [
            [p for p in self.coded(group, row, index) if p >= 0]
            for group in state.groups
            for row in range(state.batch)
            for index in range(len(group.heads))
        ]

    def draft(self, length: int, back: int) -> None:
        self.layer.end_prefill()
        self.layer.activate_past_recording()
        before = [t.clone() for t in self.layer.state.tensors()]
        self.feed(length)
        self.layer.crop(-back)
        if back:
            for name in ("keys", "values", "flags", "real"):
                kept = torch.cat(getattr(self, name), 1 if name in ("flags", "real") else 2)
                kept = kept[:, : kept.shape[1] - back] if kept.ndim == 2 else kept[:, :, :-back]
                setattr(self, name, [kept])
        if back == length:
            for ours, theirs in zip(self.layer.state.tensors(), before, strict=True):
                assert torch.equal(ours, theirs), "a rejected draft left a trace"
        self.layer.progress.record_past = False


@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases())
@torch.no_grad()
def test_what_always_holds(case):
    driver = Driver.of(case)
    for call in case.calls:
        driver.run(call)


def wider(budget: Budget | None, by: int) -> Budget | None:
    if budget is None:
        return Budget(tokens=by)
    if budget.tokens is not None:
        return Budget(tokens=budget.tokens + by)
    return Budget(ratio=min(1.0, budget.ratio * 1.5), min_tokens=budget.min_tokens + by)


def widened(plan: Plan, part: str, by: int) -> Plan:
    """Every head of `plan` with more of one thing."""

    def more(head: HeadPlan) -> HeadPlan:
        if head.full:
            return head
        cap = None if head.cap is None else head.cap + 2 * by
        if part in ("special", "punct", "local"):
            cap = None  # one part may take the room of others under a cap
        change = {part: wider(getattr(head, part), by)} if part in ("frequent", "local") else {}
        if part in ("special", "punct"):
            change = {part: True}
        if part == "full":
            return HeadPlan(full=True, k_dtype=head.k_dtype, v_dtype=head.v_dtype)
        return head.model_copy(update={**change, "cap": cap})

    rows = tuple(tuple(more(h) for h in row) for row in plan.heads)
    return plan.model_copy(update={"heads": rows})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.sampled_from(["local", "cap", "full"]), st.integers(1, 6))
@torch.no_grad()
def test_more_room_only_adds_tokens(case, part, by):
    """After the prompt for every scorer; later too where scores do not follow what was kept and
    budgets do not grow with the text: room that comes later finds other tokens gone."""
    plan = case.plan.model_copy(update={"turn_tokens": 0})
    case.calls = [c for c in case.calls if c[0] in ("prompt", "turn", "decode")]
    small, large = Driver.of(case, plan), Driver.of(case, widened(plan, part, by))
    for driver in (small, large):
        driver.case = copy.copy(case)
    small.case.plan, large.case.plan = plan, widened(plan, part, by)
    budgets_ = [b for head in plan.heads[0] for b in (head.frequent, head.local) if b is not None]
    steady = plan.scorer in STEADY and all(b.tokens is not None for b in budgets_)
    for number, call in enumerate(case.calls):
        for driver in (small, large):
            driver.run(call)
            driver.layer.end_prefill()
        if number == 0 or steady:
            for row, pairs in enumerate(zip(small.kept(), large.kept(), strict=True)):
                for few, many in zip(*pairs, strict=True):
                    # what no later query can see may lie about until its slot is needed
                    start = small.starts()[row]
                    seen = {p for p in few if small.in_sight(p, small.seen, start)}
                    assert seen <= set(many)
