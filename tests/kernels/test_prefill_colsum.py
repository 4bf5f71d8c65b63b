"""Column sums of a prompt, and the kernel that tells its normalisers, against a plain softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvcompress.kernels.prefill_colsum import cpu_torch
from kvcompress.kernels.prefill_colsum.cpu_torch import Sight, attend_with_sums, row_sums
from kvcompress.kernels.prefill_colsum.sdpa import attention_with_normaliser
from kvcompress.kernels.view import Softmax

HEADS, DIM, VALUE_DIM = 3, 16, 12
HELD = 9  # keys before those of the rows
# float32 sums of at most a hundred rows against float64 ones
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Case:
    """Rows behind `HELD` keys, and what a plain softmax in float64 makes of them."""

    def __init__(self, rows=70, group=2, softmax=None, sight=None, dtype=torch.float32):
        g = torch.Generator().manual_seed(rows + group)
        keys = rows + HELD
        self.query = torch.randn(HEADS * group, rows, DIM, generator=g).to(dtype)
        self.key = (2 * torch.randn(HEADS, keys, DIM, generator=g)).to(dtype)
        self.value = torch.randn(HEADS, keys, VALUE_DIM, generator=g).to(dtype)
        self.weight = torch.rand(rows, generator=g) * (torch.arange(rows) % 5 != 3)
        self.place = torch.arange(rows) + HELD
        self.softmax = softmax or Softmax(0.3)
        self.sight = sight or Sight(self.place)
        logits = self.query.double() @ self.key.repeat_interleave(group, 0).double().mT
        logits = logits * self.softmax.scaling
        if self.softmax.softcap is not None:
            logits = torch.tanh(logits / self.softmax.softcap) * self.softmax.softcap
        self.seen = self.sees(self.place)
        logits = logits.masked_fill(~self.seen, -torch.inf)
        if self.softmax.sinks is not None:
            sinks = self.softmax.sinks.double()[:, None, None].expand(-1, rows, 1)
            logits = torch.cat([logits, sinks], -1)
        self.normaliser = logits.logsumexp(-1)
        share = torch.exp(logits - self.normaliser[..., None]).nan_to_num(0.0)
        self.attention = share[..., :keys]  # [Hq, T, S]
        self.output = self.attention @ self.value.repeat_interleave(group, 0).double()

    def sees(self, place):
        """``[rows, keys]``."""
        key = torch.arange(self.key.shape[1])
        back = place[:, None] - key
        most = self.sight.most or 10**6
        seen = (back >= self.sight.least) & (back < most)
        if self.sight.hidden is not None:
            seen &= ~self.sight.hidden(torch.arange(len(place)), key)
        return seen

    def sums(self, weight, seen=True):
        counted = self.attention * weight.double()[:, None] * seen
        return counted.sum(1).unflatten(0, (HEADS, -1)).sum(1)


def hidden(rows, key):
    """Padding in front of row 40, and of each key every seventh."""
    return ((rows[:, None] >= 40) & (key < 5)) | (key % 7 == 2)


CASES = {
    "causal": {},
    "one query head": {"group": 1},
    "one row": {"rows": 1},
    "window": {"sight": Sight(torch.arange(70) + HELD, most=13)},
    "mask": {"sight": Sight(torch.arange(70) + HELD, hidden=hidden)},
    "window and mask": {"sight": Sight(torch.arange(70) + HELD, most=20, hidden=hidden)},
    "soft cap": {"softmax": Softmax(0.3, softcap=2.0)},
    "sinks": {"softmax": Softmax(0.3, sinks=torch.linspace(-2, 6, HEADS * 2))},
}


@pytest.fixture(params=["whole", "small blocks"])
def blocks(request, monkeypatch):
    """As blocks come, and so small that there are many, of heads and of rows."""
    if request.param == "small blocks":
        monkeypatch.setattr(cpu_torch, "BLOCK_ELEMENTS", 2 * 2 * 7 * 79)
        monkeypatch.setattr(cpu_torch, "_FEWEST_ROWS", 3)


@pytest.mark.parametrize("name", CASES)
def test_output_normalisers_and_sums_in_one_pass(name, blocks):
    case = Case(**CASES[name])
    heads, rows, _ = case.query.shape
    out, normaliser = torch.empty(rows, heads, VALUE_DIM), torch.empty(heads, rows)
    given = [t.clone() for t in (case.query, case.key, case.value)]
    sums = attend_with_sums(
        case.query, case.key, case.value, case.softmax, case.sight, case.weight, out, normaliser
    )
    torch.testing.assert_close(out.transpose(0, 1).double(), case.output, **CLOSE)
    torch.testing.assert_close(normaliser.double(), case.normaliser, **CLOSE)
    torch.testing.assert_close(sums.double(), case.sums(case.weight), **CLOSE)
    assert all(map(torch.equal, given, (case.query, case.key, case.value)))


def test_no_sums_where_nobody_votes():
    case = Case()
    out, normaliser = torch.empty(70, 6, VALUE_DIM), torch.empty(6, 70)
    args = (case.query, case.key, case.value, case.softmax, case.sight)
    assert attend_with_sums(*args, None, out, normaliser) is None
    torch.testing.assert_close(out.transpose(0, 1).double(), case.output, **CLOSE)


def test_a_row_that_sees_nothing_gives_nothing():
    sight = Sight(
        torch.arange(70) + HELD, hidden=lambda rows, key: (rows < 20)[:, None] | (key < 0)
    )
    case = Case(sight=sight)
    out, normaliser = torch.empty(70, 6, VALUE_DIM), torch.empty(6, 70)
    args = (case.query, case.key, case.value, case.softmax, sight)
    sums = attend_with_sums(*args, torch.ones(70), out, normaliser)
    assert (out[:20] == 0).all() and (normaliser[:, :20] == -torch.inf).all()
    late = (torch.arange(70) >= 20).float()
    torch.testing.assert_close(sums.double(), case.sums(late), **CLOSE)
    again = row_sums(case.query, case.key, case.softmax, sight, torch.ones(70), normaliser)
    torch.testing.assert_close(again.double(), case.sums(late), **CLOSE)


@pytest.mark.parametrize("name", [n for n in CASES if n != "one row"])
@pytest.mark.parametrize("known", [True, False])
def test_sums_of_chosen_rows(name, known, blocks):
    """Any rows of a prompt, with normalisers or with their own."""
    case = Case(**CASES[name])
    chosen = torch.tensor([0, 3, 4, 5, 21, 40, 41, 68, 69])
    own_hidden = case.sight.hidden
    sight = Sight(
        case.place[chosen],
        0,
        case.sight.most,
        None if own_hidden is None else lambda rows, key: own_hidden(chosen[rows], key),
    )
    weight = case.weight[chosen]
    given = case.query.clone()
    normaliser = case.normaliser[:, chosen].float() if known else None
    sums = row_sums(case.query[:, chosen], case.key, case.softmax, sight, weight, normaliser)
    only = torch.zeros_like(case.weight).index_copy_(0, chosen, weight)
    torch.testing.assert_close(sums.double(), case.sums(only), **CLOSE)
    assert torch.equal(given, case.query)


@pytest.mark.parametrize(("least", "most"), [(0, 11), (11, None), (11, 30), (200, None), (0, 500)])
def test_sums_over_near_and_far_keys(least, most, blocks):
    case = Case()
    sight = Sight(case.place, least, most)
    sums = row_sums(case.query, case.key, case.softmax, sight, case.weight, case.normaliser.float())
    back = case.place[:, None] - torch.arange(case.key.shape[1])
    counted = (back >= least) & (back < (most or 10**6))
    torch.testing.assert_close(sums.double(), case.sums(case.weight, counted), **CLOSE)


def test_rows_without_weight_have_no_part():
    """Padding has queries, keys and normalisers of any kind."""
    case = Case()
    normaliser = case.normaliser.float()
    case.weight[:12] = 0
    expected = row_sums(case.query, case.key, case.softmax, case.sight, case.weight, normaliser)
    case.query[:, :12], normaliser[:, :12] = 1e4, torch.tensor([-torch.inf, torch.nan]).repeat(6)
    got = row_sums(case.query, case.key, case.softmax, case.sight, case.weight, normaliser)
    assert torch.equal(got, expected)


def test_half_precision_inputs_are_read_exactly():
    case = Case(dtype=torch.bfloat16)
    out, normaliser = torch.empty(70, 6, VALUE_DIM), torch.empty(6, 70)
    args = (case.query, case.key, case.value, case.softmax, case.sight)
    sums = attend_with_sums(*args, case.weight, out, normaliser)
    torch.testing.assert_close(sums.double(), case.sums(case.weight), **CLOSE)
    torch.testing.assert_close(out.transpose(0, 1).double(), case.output, **CLOSE)


def test_the_upper_triangle_is_not_computed(monkeypatch):
    """Blocks of 16 rows end at the last key that any of them sees."""
    monkeypatch.setattr(cpu_torch, "BLOCK_ELEMENTS", 16 * 64)
    case, elements = Case(rows=64, group=1), []
    for *_, logits in cpu_torch._Blocks(case.query, case.key, case.softmax, case.sight):
        elements.append(logits.numel())
    assert sum(elements) == HEADS * sum(16 * (HELD + stop) for stop in (16, 32, 48, 64))


# ---- the framework's kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_frameworks_kernel_and_its_normalisers(dtype, masked):
    g = torch.Generator().manual_seed(7)
    batch, heads, group, length = 2, 2, 3, 45

    def made(count):  # as attention modules make them: heads behind tokens in memory
        return torch.randn(batch, length, count, DIM, generator=g).to(dtype).transpose(1, 2)

    query, key, value = made(heads * group), made(heads), made(heads)
    seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    seen[1, :, :, :8] = False
    seen[1, :, range(8), range(8)] = True  # padding sees itself, as transformers has it
    wide = [t.repeat_interleave(group, 1) for t in (key, value)]
    if masked:
        expected = F.scaled_dot_product_attention(query, *wide, attn_mask=seen, scale=0.3)
    else:
        expected = F.scaled_dot_product_attention(query, *wide, is_causal=True, scale=0.3)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
    found = attention_with_normaliser(query, key, value, seen if masked else None, 0.3)
    assert found is not None
    out, normaliser = found
    assert torch.equal(out.transpose(1, 2), expected) and out.is_contiguous()
    logits = (query.float() @ wide[0].float().mT * 0.3).masked_fill(~seen, -torch.inf)
    # the kernel multiplies in the inputs' own dtype and adds up in float32
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-3}
    torch.testing.assert_close(normaliser, logits.logsumexp(-1), **close)


def test_no_kernel_for_values_of_another_width():
    query = torch.randn(1, 2, 5, 8)
    assert attention_with_normaliser(query, query, torch.randn(1, 2, 5, 4), None, 1.0) is None
    strided = torch.randn(1, 2, 5, 16)[..., ::2]
    assert attention_with_normaliser(strided, query, query, None, 1.0) is None


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_the_kernel_on_a_gpu(group):
    g = torch.Generator().manual_seed(8)
    shape = (2, 256, 2, 64)
    query = torch.randn(*shape[:2], shape[2] * group, shape[3], generator=g)
    key, value = (torch.randn(shape, generator=g) for _ in range(2))
    query, key, value = (t.transpose(1, 2).cuda().bfloat16() for t in (query, key, value))
    found = attention_with_normaliser(query, key, value, None, 0.125)
    assert found is not None
    wide = [t.repeat_interleave(group, 1) for t in (key, value)]
    expected = F.scaled_dot_product_attention(query, *wide, is_causal=True, scale=0.125)
    torch.testing.assert_close(found[0].transpose(1, 2), expected, rtol=0, atol=2e-2)
    hidden = torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1)
    logits = (query.float() @ wide[0].float().mT * 0.125).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(found[1], logits.logsumexp(-1), rtol=0, atol=2e-3)
    assert attention_with_normaliser(query, key, value, ~hidden.expand(2, 1, -1, -1), 1.0) is None
