"""Every published scorer against loops in float64 that follow the paper's formula."""

import math

import pytest
import torch

from kvcompress.errors import PlanError
from kvcompress.evict.scorers import QueryRows, scorer
from kvcompress.quant.keystats import Rotation
from tests.evict.prompts import SCALING, Prompt, prompt, ranks_of, scores_of

PADS = [(0, 0), (7, 0)]


def double(values):
    return values.double().tolist()


def real(data: Prompt, b: int) -> range:
    return range(data.pads[b], data.length)


def close(got, expected, tolerance=1e-5):
    """Of the tokens of `expected`, ``{(b, h, i): number}``."""
    for place, number in expected.items():
        assert float(got[place]) == pytest.approx(number, rel=tolerance, abs=tolerance), place


# ---- Scissorhands and CORM
def important(data: Prompt):
    """``[b][h][g][t] -> set`` of the keys that row t gives at least 1/t, t counted from 1."""
    attention = double(data.attention())
    return [
        [
            [
                {
                    t: {i for i in real(data, b) if i <= t and row[t][i] >= 1 / (t - low + 1)}
                    for t in real(data, b)
                }
                for row in head
            ]
            for head in attention[b]
        ]
        for b, low in enumerate(data.pads)
    ]


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("window", [None, 9])
def test_scissorhands_counts_the_rows_that_found_a_token_unimportant(pads, window):
    data = prompt(1, pads=pads)
    found, expected = important(data), {}
    for b in range(2):
        rows = list(real(data, b))[-window if window else 0 :]
        for h in range(2):
            for i in real(data, b):
                low_counts = [sum(i not in g[t] for t in rows if t >= i) for g in found[b][h]]
                expected[b, h, i] = -sum(low_counts) / 2
    close(ranks_of(scorer("vote"), data, score_rows=window), expected)


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("window", [3, 8])
def test_corm_keeps_what_one_of_the_last_rows_found_important(pads, window):
    data = prompt(2, pads=pads, sharp=6.0)
    found = important(data)
    rank = ranks_of(scorer("corm"), data)
    dropped = 0
    for b in range(2):
        last = [t for t in real(data, b) if t > data.length - 1 - window]
        for h in range(2):
            ring = set().union(*(g[t] for g in found[b][h] for t in last)) | set(last)
            above = {i for i in real(data, b) if rank[b, h, i] >= -(window - 1)}
            assert above == ring
            dropped += data.length - data.pads[b] - len(ring)
    assert dropped > 10


def test_corm_hears_no_row_that_may_not_vote():
    data = prompt(2)
    weight = torch.zeros(4, data.length)
    weight[:, 20:] = 0.5
    said = scorer("corm").collect(data.attention().flatten(0, 1), rows_of(weight, data.length))
    spoken = said > -torch.inf
    assert spoken.any() and said[spoken].min() >= 20
    assert not torch.equal(said, scorer("corm").collect(
        data.attention().flatten(0, 1), rows_of(weight + 1, data.length)
    ))  # fmt: skip


# ---- TOVA
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("score_rows", [None, 1])
def test_tova_is_the_last_row_over_all_heads(pads, score_rows):
    data = prompt(3, pads=pads)
    attention = double(data.attention())
    expected = {
        (b, h, i): sum(g[-1][i] for head in attention[b] for g in head) / 4
        for b in range(2)
        for h in range(2)
        for i in real(data, b)
    }
    close(ranks_of(scorer("tova"), data, score_rows=score_rows), expected)


def test_tova_leaves_scores_alone_where_no_row_votes():
    data = prompt(3)
    tova = scorer("tova")
    silent = tova.collect(
        data.attention().flatten(0, 1), rows_of(torch.zeros(4, data.length), data.length)
    )
    score = torch.rand(4, data.length)
    assert torch.equal(tova.merge(score, silent), score)
    # each sequence has its own newest voting row
    weight = torch.zeros(4, data.length)
    weight[0, 5] = weight[1, 20] = weight[1, 3] = 1.0
    said = tova.collect(data.attention().flatten(0, 1), rows_of(weight, data.length))
    merged = tova.merge(score, said)
    mean = data.attention().flatten(0, 1).mean(1)
    assert torch.equal(merged[0], mean[0, 5]) and torch.equal(merged[1], mean[1, 20])
    assert torch.equal(merged[2:], score[2:])


def rows_of(weight, count):
    return QueryRows(weight, torch.arange(count).expand_as(weight), torch.arange(count))


# ---- sums, SnapKV, values
def attention_sums(data: Prompt, b, h, rows, attention):
    """Mean over the query heads of the sum over `rows` that each token got, ``{i: number}``."""
    return {
        i: sum(g[t][i] for g in attention[b][h] for t in rows if t >= i) / 2 for i in real(data, b)
    }


@pytest.mark.parametrize("pads", PADS)
def test_snapkv_sums_the_last_rows_and_averages_over_neighbours(pads):
    data = prompt(4, pads=pads)
    attention, expected = double(data.attention()), {}
    for b in range(2):
        for h in range(2):
            sums = attention_sums(data, b, h, real(data, b)[-6:], attention)
            for i in list(real(data, b))[:-6]:
                near = [sums[j] for j in range(i - 2, i + 3) if j in sums]
                expected[b, h, i] = sum(near) / len(near) / 6
    close(ranks_of(scorer("mean"), data, score_rows=6, pool_tokens=5), expected)


@pytest.mark.parametrize("pads", PADS)
def test_value_is_attention_sums_times_the_size_of_the_value(pads):
    data = prompt(5, pads=pads)
    attention = double(data.attention())
    rank, expected = ranks_of(scorer("value"), data), {}
    for b in range(2):
        for h in range(2):
            sums = attention_sums(data, b, h, real(data, b), attention)
            sizes = {i: sum(map(abs, double(data.value)[b][h][i])) for i in sums}
            mean = sum(sizes.values()) / len(sizes)
            expected |= {(b, h, i): sums[i] * sizes[i] / mean for i in sums}
    close(rank, expected)
    assert torch.equal(
        scorer("value").finish(torch.ones(2, 2, 30), replaced(data, value=0 * data.value).tokens()),
        torch.ones(2, 2, 30),
    )


def replaced(data: Prompt, **fields) -> Prompt:
    return Prompt(**{**data.__dict__, **fields})


# ---- CriticalKV
def critical_choice(data: Prompt, b, h, rows, budget, attention, candidate=None):
    """Algorithm 1: half by attention, the rest by (A + ε) ‖W_O v‖₁."""
    sums = attention_sums(data, b, h, rows, attention)
    weight, value = double(data.output_weight)[h], double(data.value)[b][h]
    share = {i: sums[i] / len(rows) for i in sums}
    width = len(value[0])

    def projected(i):
        total = 0.0
        for g in range(2):
            for line in weight:
                total += abs(sum(line[g * width + d] * value[i][d] for d in range(width)))
        return total / 2

    offered = [i for i in sums if candidate is None or candidate[b][h][i]]
    first = sorted(offered, key=lambda i: -share[i])[: int(budget * 0.5)]
    rest = [i for i in offered if i not in first]
    rest.sort(key=lambda i: -(share[i] + 1e-4) * projected(i))
    return set(first) | set(rest[: budget - len(first)]), first


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize(("score_rows", "sharp"), [(None, 3.0), (8, 3.0), (8, 15.0)])
def test_critical_takes_half_by_attention_and_the_rest_by_projected_values(pads, score_rows, sharp):
    """Sharp attention leaves most tokens nothing but ε."""
    data = prompt(6, pads=pads, sharp=sharp)
    data.budget = torch.tensor([[9, 4], [1, 24]])
    attention = double(data.attention())
    score = scores_of(scorer("critical"), data, score_rows=score_rows)
    for b in range(2):
        rows = real(data, b)[-score_rows if score_rows else 0 :]
        for h in range(2):
            budget = int(data.budget[b, h])
            expected, first = critical_choice(data, b, h, rows, budget, attention)
            own = score[b, h].masked_fill(~data.valid[b], -torch.inf)
            assert set(own.topk(budget).indices.tolist()) == expected
            if first:
                assert set(own.topk(len(first)).indices.tolist()) == set(first)


def test_criticals_first_stage_spends_nothing_on_tokens_that_stay_anyway():
    data = prompt(7)
    data.budget = torch.full((2, 2), 8)
    data.candidate = (torch.arange(30) >= 4) & (torch.arange(30) < 24)
    data.candidate = data.candidate.expand(2, 2, 30)
    attention = double(data.attention())
    score = scores_of(scorer("critical"), data, score_rows=8)
    score = score.masked_fill(~data.candidate, -torch.inf)
    for b in range(2):
        for h in range(2):
            expected, _ = critical_choice(
                data, b, h, range(22, 30), 8, attention, data.candidate.tolist()
            )
            assert set(score[b, h].topk(8).indices.tolist()) == expected


def test_critical_without_a_budget_has_one_stage_and_without_a_projection_none():
    data = prompt(8)
    attention = double(data.attention())
    score = scores_of(scorer("critical"), data)
    for b in range(2):
        for h in range(2):
            for count in (3, 11):
                # a budget of which nothing goes by attention alone
                data.budget = None
                sums = attention_sums(data, b, h, range(30), attention)
                small = {i: sums[i] / 30 for i in sums}
                expected, _ = second_stage_alone(data, b, h, small, count)
                assert set(score[b, h].topk(count).indices.tolist()) == expected
    with pytest.raises(PlanError, match="layer 0: the scorer needs the attention's output proj"):
        scorer("critical").finish(torch.ones(2, 2, 30), replaced(data, output_weight=None).tokens())


def second_stage_alone(data, b, h, share, count):
    weight, value = data.output_weight[h].double(), data.value[b, h].double()
    parts = weight.unflatten(1, (2, -1))
    size = torch.einsum("ogd,td->tgo", parts, value).abs().sum(-1).mean(-1)
    order = sorted(share, key=lambda i: -(share[i] + 1e-4) * float(size[i]))
    return set(order[:count]), order


# ---- KeyDiff
@pytest.mark.parametrize("pads", PADS)
def test_key_diff_is_minus_the_cosine_to_the_mean_unit_key(pads):
    data = prompt(9, pads=pads)
    keys, expected = double(data.key), {}
    for b in range(2):
        for h in range(2):
            unit = {}
            for i in real(data, b):
                norm = math.sqrt(sum(x * x for x in keys[b][h][i]))
                unit[i] = [x / norm for x in keys[b][h][i]]
            mean = [sum(u[d] for u in unit.values()) / len(unit) for d in range(8)]
            norm = math.sqrt(sum(x * x for x in mean))
            for i, u in unit.items():
                expected[b, h, i] = -sum(x * y for x, y in zip(u, mean, strict=True)) / norm
    close(ranks_of(scorer("key_diff"), data), expected)


# ---- Expected Attention
def rotation_matrix(rotation: Rotation, position: int, dim: int):
    """``[dim, dim]`` float64, entry by entry."""
    matrix = torch.eye(dim, dtype=torch.float64)
    half = len(rotation.inv_freq)
    for j, frequency in enumerate(rotation.inv_freq.double().tolist()):
        a, b = (j, j + half) if rotation.convention == "half-split" else (2 * j, 2 * j + 1)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        matrix[a, a] = matrix[b, b] = cos
        matrix[a, b], matrix[b, a] = -sin, sin
    return matrix


def expected_attention(data: Prompt, b, h, positions):
    """``{i: score}`` as the paper has it, of a row whose tokens lie at `positions`."""
    tokens, dim = list(real(data, b)), data.key.shape[-1]
    mean_turn = torch.eye(dim, dtype=torch.float64)
    if data.rotation is not None:
        last = positions[-1]
        turns = [rotation_matrix(data.rotation, last + j, dim) for j in range(1, 513)]
        mean_turn = sum(turns) / 512
    total = dict.fromkeys(tokens, 0.0)
    for g in range(2):
        before = []
        for i, p in list(zip(tokens, positions, strict=True))[4:]:
            query = data.query[b, h, g, i].double()
            if data.rotation is not None:
                query = rotation_matrix(data.rotation, p, dim).T @ query
            before.append(query)
        before = torch.stack(before)
        mu = before.mean(0)
        sigma = (before - mu).T @ (before - mu) / len(before)
        mu, sigma = mean_turn @ mu, mean_turn @ sigma @ mean_turn.T
        weight = {}
        for i in tokens:
            k = data.key[b, h, i].double()
            weight[i] = math.exp(float(k @ mu * SCALING + k @ sigma @ k * SCALING**2 / 2))
        for i in tokens:
            total[i] += weight[i] / sum(weight[j] for j in tokens[4:])
    return {i: total[i] / 2 * float(data.value[b, h, i].double().norm()) for i in tokens}


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("convention", ["half-split", "interleaved", None])
def test_expected_attention(pads, convention):
    data = prompt(10, pads=pads)
    data.first_position = 5
    frequency = torch.tensor([0.9, 0.2, 0.001], dtype=torch.float64)  # two channels stay
    data.rotation = None if convention is None else Rotation(frequency, convention)
    got = ranks_of(scorer("expected"), data).exp()
    for b in range(2):
        positions = [i + 5 for i in real(data, b)]
        for h in range(2):
            wanted = expected_attention(data, b, h, positions)
            close(got, {(b, h, i): x for i, x in wanted.items()}, 1e-4)
            # a model that numbers the row's tokens from 0 turns queries and keys together
            moved = expected_attention(shifted(data, b), b, h, [p - 5 for p in positions])
            assert moved == pytest.approx(wanted, rel=1e-6)


def shifted(data: Prompt, b: int) -> Prompt:
    """Row b as if its tokens had come 5 positions earlier."""
    if data.rotation is None:
        return data
    turn = rotation_matrix(data.rotation, -5, 8)
    return replaced(
        data, query=data.query.double() @ turn.T, key=data.key.double() @ turn.T, first_position=0
    )


def test_expected_attention_orders_tokens_whose_shares_underflow():
    data = prompt(11, sharp=1.0)
    data.key = data.key * 40
    rank = ranks_of(scorer("expected"), data)
    assert rank.isfinite().all()
    assert rank[0, 0].unique().numel() == 30
    assert (rank[0, 0].exp() == 0).sum() > 10


def test_expected_attention_of_a_prompt_of_sinks_and_without_queries():
    data = prompt(12, length=3)
    assert ranks_of(scorer("expected"), data).isfinite().all()
    with pytest.raises(ValueError, match="expected attention needs the prompt's queries"):
        scorer("expected").finish(torch.zeros(2, 2, 3), data.tokens(0))


# ---- Random with the prompt kept
def test_random_generated_keeps_the_prompt_before_what_follows():
    data = prompt(13)
    found = scorer("random_generated")
    prompt_rank = ranks_of(found, data)
    later = found.initial(torch.zeros(500, 8), torch.arange(30, 530), torch.zeros(500))
    assert prompt_rank.min() >= 1 > later.max()
    assert later.std() == pytest.approx(math.sqrt(1 / 12), abs=0.02)
    position = torch.arange(30).expand(2, 30)
    raw = scorer("random").initial(data.key[0], position, torch.arange(2)[:, None].expand(2, 30))
    torch.testing.assert_close(prompt_rank[0], raw + 1)
