"""Decisions at a prompt's end against loops in float64, and what must hold for any attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.evict.keep_set_ladder import fastgen_ladder
from kvcompress.evict.per_request import (
    LOW_QUANTILE,
    KeepSizes,
    NewestRows,
    fastgen_choice,
    pooled_budgets,
    threshold_counts,
)
from kvcompress.plan import Budget, FastGenChoice, HeadPlan
from kvcompress.profile import measure


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- pooled budgets
def naive_pool(rank, budget, floor):
    """One row: give every head its floor, then hand out the rest one token at a time.

    Gives the counts, and how many tokens each head has.
    """
    queues = [
        sorted((r for r in head if r > -math.inf), reverse=True) for head in rank.double().tolist()
    ]
    granted = [
        min(len(q), math.ceil(floor * b - 1e-9)) for q, b in zip(queues, budget, strict=True)
    ]
    while sum(granted) < min(sum(budget), sum(map(len, queues))):
        open_heads = [h for h, q in enumerate(queues) if granted[h] < len(q)]
        best = max(open_heads, key=lambda h: (queues[h][granted[h]], -h))
        granted[best] += 1
    return granted, [len(q) for q in queues]


@given(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 30), st.sampled_from([0, 0.2, 0.5, 1])
)
def test_pool_is_one_token_at_a_time(seed, heads, count, floor):
    # few distinct ranks, so that ties are common
    rank = torch.randint(0, 6, (2, heads, count), generator=random(seed)).float()
    rank = rank.masked_fill(torch.rand(rank.shape, generator=random(seed + 1)) < 0.3, -torch.inf)
    budget = torch.randint(0, 12, (2, heads), generator=random(seed + 2))
    granted = pooled_budgets(rank, budget, floor)
    for row in range(2):
        own = budget[row].tolist()
        expected, most = naive_pool(rank[row], own, floor)
        assert sum(granted[row]) == sum(own)
        if sum(own) <= sum(most):
            assert granted[row] == expected
        for head, count in enumerate(granted[row]):
            assert expected[head] <= count <= max(expected[head], own[head])


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_pool_conserves_the_sum_and_every_floor(seed, floor):
    rank = torch.rand(3, 4, 40, generator=random(seed))
    budget = torch.randint(0, 20, (3, 4), generator=random(seed))
    granted = torch.tensor(pooled_budgets(rank, budget, floor))
    assert torch.equal(granted.sum(1), budget.sum(1))
    assert (granted >= floor * budget - 1e-6).all()
    padded = torch.cat([torch.full((3, 4, 7), -torch.inf), rank], -1)
    assert pooled_budgets(padded, budget, floor) == granted.tolist()
    alone = [pooled_budgets(rank[i : i + 1], budget[i : i + 1], floor)[0] for i in range(3)]
    assert alone == granted.tolist()


def test_the_whole_floor_leaves_budgets_alone_and_none_takes_the_best():
    rank = torch.stack([torch.arange(10.0), torch.arange(10.0) + 100])[None]
    budget = torch.tensor([[4, 3]])
    assert pooled_budgets(rank, budget, 1.0) == [[4, 3]]
    assert pooled_budgets(rank, budget, 0.0) == [[0, 7]]
    assert pooled_budgets(rank, budget, 0.5) == [[2, 5]]  # ceil(2), ceil(1.5), the rest to head 1
    assert pooled_budgets(rank * 0, budget, 0.0) == [[7, 0]]  # ties: the earlier head


def test_what_a_head_cannot_use_goes_to_the_others():
    rank = torch.rand(1, 3, 10)
    rank[0, 0, 2:] = -torch.inf
    first, *others = pooled_budgets(rank, torch.tensor([[6, 1, 1]]), 1.0)[0]
    assert first == 2 and sum(others) == 6
    assert pooled_budgets(rank, torch.tensor([[60, 1, 1]]), 0.2) == [[42, 10, 10]]
    assert pooled_budgets(rank, torch.tensor([[30, 30, 30]]), 0.2) == [[30, 30, 30]]
    assert pooled_budgets(rank[..., :0], torch.tensor([[6, 1, 1]]), 0.2) == [[6, 1, 1]]


# ---- thresholds
def test_threshold_counts_what_ranks_high_enough_up_to_the_cap():
    rank = torch.tensor([[[1.0, 2.0, 3.0, -torch.inf], [-5.0, -5.0, 2.0, 2.0]]])
    assert threshold_counts(rank, 2.0, torch.tensor([[9, 9]])) == [[2, 2]]
    assert threshold_counts(rank, 2.0, torch.tensor([[1, 0]])) == [[1, 0]]
    assert threshold_counts(rank, -math.inf, torch.tensor([[9, 9]])) == [[3, 4]]


@given(st.integers(0, 2**31), st.floats(-2, 2))
def test_a_lower_threshold_only_adds(seed, threshold):
    rank = torch.randn(2, 3, 20, generator=random(seed))
    cap = torch.randint(0, 20, (2, 3), generator=random(seed))
    high = torch.tensor(threshold_counts(rank, threshold, cap))
    low = torch.tensor(threshold_counts(rank, threshold - 0.5, cap))
    assert (low >= high).all() and (high <= cap).all()


# ---- FastGen's choice
class Case:
    """Random attention of a prompt's last rows, each head sharpened differently."""

    def __init__(self, seed, tokens=48, rows=24, batch=2, heads=3, group=2, pads=(0, 0)):
        g = random(seed)
        logits = torch.randn(batch, heads, group, rows, tokens, generator=g, dtype=torch.float64)
        logits = logits * torch.tensor([1.0, 4.0, 8.0, 2.0, 3.0])[:heads].view(1, -1, 1, 1, 1)
        logits[:, 0, :, :, :2] += 8  # a head that looks at the first tokens
        self.key = torch.arange(tokens)
        self.query = self.key[-rows:]
        self.valid = self.key >= torch.tensor(pads)[:, None]
        seen = (self.key <= self.query[:, None]) & self.valid[:, None]
        hidden = ~seen[:, None, None]
        # padding may hold anything
        self.probability = logits.masked_fill(hidden, -1e9).softmax(-1)
        self.special = torch.rand(batch, tokens, generator=g) < 0.05
        self.punct = torch.rand(batch, tokens, generator=g) < 0.15
        self.rank = torch.rand(batch, heads, tokens, generator=g)
        self.frequent = torch.tensor([5, 9])[:batch]
        self.local = torch.tensor([6, 11])[:batch]

    def choice(self, recovery, reading="mass", sinks=2, recent=3):
        rows = NewestRows(
            self.probability, self.query, self.key, self.valid, self.special, self.punct, self.rank
        )
        rule = FastGenChoice(kind="fastgen", recovery=recovery, reading=reading)
        return fastgen_choice(rows, KeepSizes(sinks, recent, self.frequent, self.local), rule)

    def kept(self, b, h, q, place, sinks=2, recent=3):
        """Places that keep-set `place` of the chain holds when row `q` is the newest."""
        past = [i for i in range(q + 1) if self.valid[b, i]]
        keep = set(past[:sinks]) | {i for i in past if i > q - recent}
        keep |= {i for i in past if self.special[b, i]}
        if place == 4:
            return set(past)
        if place >= 1:
            keep |= {i for i in past if self.punct[b, i]}
        if place == 3:
            keep |= {i for i in past if i > q - int(self.local[b])}
        if place >= 2:
            classes = {i for i in past if self.punct[b, i] or self.special[b, i]}
            rest = [i for i in past if i not in keep | classes]
            rest.sort(key=lambda i: (-float(self.rank[b, h, i]), i))
            keep |= set(rest[: int(self.frequent[b])])
        return keep

    def recovered(self, b, h, place):
        """By the definition, in loops."""
        worst = []
        for g in range(self.probability.shape[2]):
            masses = [
                sum(float(self.probability[b, h, g, w, i]) for i in self.kept(b, h, q, place))
                for w, q in enumerate(self.query.tolist())
                if self.valid[b, q]
            ]
            worst.append(
                float(torch.quantile(torch.tensor(masses, dtype=torch.float64), LOW_QUANTILE))
            )
        return min(worst)


def test_the_quantile_is_that_of_the_profile():
    assert LOW_QUANTILE == measure.LOW_QUANTILE


@pytest.mark.parametrize("pads", [(0, 0), (9, 0), (0, 31)])
@pytest.mark.parametrize("seed", range(3))
def test_choice_is_the_first_that_recovers_enough(seed, pads):
    case = Case(seed, pads=pads)
    found = set()
    table = [[[case.recovered(b, h, p) for p in range(5)] for h in range(3)] for b in range(2)]
    for recovery in (0.2, 0.5, 0.7, 0.9, 0.99):
        for reading in ("mass", "l1"):

            def good(mass, recovery=recovery, reading=reading):
                return mass >= recovery if reading == "mass" else 2 * (1 - mass) <= 1 - recovery

            expected = [
                [next(p for p in range(5) if good(line[p] + 1e-12)) for line in row]
                for row in table
            ]
            assert case.choice(recovery, reading) == expected
            found |= {place for row in expected for place in row}
    assert len(found) >= 3  # the planted heads below take all five


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.floats(0.05, 1), st.floats(0.05, 1))
def test_choice_grows_with_the_target_and_l1_asks_for_more(seed, one, other):
    case = Case(seed)
    low, high = (torch.tensor(case.choice(t)) for t in sorted((one, other)))
    assert (low <= high).all()
    assert (torch.tensor(case.choice(one, "l1")) >= torch.tensor(case.choice(one))).all()
    for b in range(2):
        for h in range(3):
            for q in case.query.tolist()[::7]:
                sets = [case.kept(b, h, q, place) for place in range(5)]
                assert all(a <= b for a, b in zip(sets, sets[1:], strict=False))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.05, 1))
def test_padding_changes_nothing(seed, pads, recovery):
    """Also where the row has fewer tokens than there are rows, and whatever the padding holds."""
    case = Case(seed, batch=1, pads=(0,))
    wide = Case(seed, batch=1, pads=(0,))
    tokens = 48 + pads
    wide.key = torch.arange(tokens)
    wide.query = wide.key[-30:]
    wide.valid = (wide.key >= pads)[None]
    junk = torch.rand(1, 3, 2, 30, tokens, dtype=torch.float64)
    junk[..., -24:, pads:] = case.probability
    junk[..., -24:, :pads] = 0
    wide.probability = junk[..., -24:, :]
    wide.query = wide.query[-24:]
    for name in ("special", "punct", "rank"):
        own = getattr(case, name)
        front = torch.ones(*own.shape[:-1], pads).to(own.dtype)
        setattr(wide, name, torch.cat([front, own], -1))
    assert wide.choice(recovery) == case.choice(recovery)


def test_a_row_shorter_than_the_rows_is_read_as_if_alone():
    case = Case(5, batch=1, tokens=30, rows=30, pads=(18,))
    alone = Case(5, batch=1, tokens=12, rows=12, pads=(0,))
    alone.probability = case.probability[..., 18:, 18:]
    alone.special, alone.punct = case.special[:, 18:], case.punct[:, 18:]
    alone.rank = case.rank[..., 18:]
    for recovery in (0.3, 0.6, 0.9):
        assert case.choice(recovery) == alone.choice(recovery)
    case.valid = torch.zeros_like(case.valid)
    assert case.choice(0.1) == [[4, 4, 4]]


def test_heads_with_planted_structure_get_their_keep_sets():
    """A head of each kind, and one that is all of them at once."""
    tokens, rows = 64, 32
    case = Case(0, tokens=tokens, rows=rows, batch=1, heads=5, group=1, pads=(0,))
    case.special = torch.zeros(1, tokens, dtype=torch.bool)
    case.punct = (torch.arange(tokens) % 10 == 9)[None]
    case.rank = torch.zeros(1, 5, tokens)
    case.rank[..., 12] = 1.0
    case.frequent, case.local = torch.tensor([3]), torch.tensor([16])
    p = torch.zeros(1, 5, 1, rows, tokens, dtype=torch.float64)
    for w, q in enumerate(range(tokens - rows, tokens)):
        p[0, 0, 0, w, 0] = 1  # the sink
        p[0, 1, 0, w, 19] = 1  # punctuation
        p[0, 2, 0, w, 12] = 1  # the token that ranks best
        p[0, 3, 0, w, q - 11] = 1  # far neighbours
        p[0, 4, 0, w, (7 * q) % 23] = 1  # anything
    case.probability = p
    assert case.choice(0.95) == [[0, 1, 2, 3, 4]]
    case.probability = p.mean(1, keepdim=True).expand_as(p)
    assert case.choice(0.95) == [[4] * 5]


# ---- the chain
def test_chain_is_nested_data():
    chain = fastgen_ladder(Budget(ratio=0.3), Budget(ratio=0.3), "model", "int4")
    assert [head.label for head in chain] == [
        "special",
        "special+punct",
        "special+punct+frequent 0.3",
        "special+punct+frequent 0.3+local 0.3",
        "full",
    ]
    assert all(head.storage == "k16v4" for head in chain)
    assert chain[4] == HeadPlan(full=True, k_dtype="model", v_dtype="int4")
