"""The keep rule over held-out rows, against loops that spell it out."""

import pytest
import torch

from kvcompress.plan import Budget, HeadPlan
from kvcompress.profile.collect import BLOCK_ROWS
from kvcompress.profile.masks import KeepMasks
from kvcompress.recipe import Keep
from tests.profile.rows import random_rows

KEEP = Keep(sink_tokens=3, recent_tokens=6)
SPECIAL, PUNCT = {0, 50}, {20, 21, 140}
HEADS = [
    HeadPlan(),
    HeadPlan(special=True),
    HeadPlan(special=True, punct=True),
    HeadPlan(local=Budget(tokens=30)),
    HeadPlan(frequent=Budget(ratio=0.1)),
    HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.2), local=Budget(ratio=0.1)),
    HeadPlan(full=True),
]


def masks_of(rows):
    tokens = torch.arange(rows.key.shape[1])
    member = [torch.isin(tokens, torch.tensor(sorted(ids))) for ids in (SPECIAL, PUNCT)]
    return KeepMasks(rows, KEEP, *member)


def spelled_out(rows, plan, head):
    """Kept tokens of one KV head at each held-out row, as a list of sets."""
    n, total = rows.prompt_tokens, rows.key.shape[1]
    window = rows.softmax.window or total
    sinks = set(range(0 if rows.softmax.window else KEEP.sink_tokens))
    classes = (SPECIAL if plan.special else set()) | (PUNCT if plan.punct else set())
    local = plan.local.resolve(n) if plan.local else 0
    budget = plan.frequent.resolve(n) if plan.frequent else 0
    width = max(local, KEEP.recent_tokens)
    dropped, chosen, result = set(), set(), []
    for q in range(n, total):
        seen = {i for i in range(q + 1) if i > q - window}
        if plan.full:
            result.append(seen)
            continue
        if budget and (q - n) % BLOCK_ROWS == 0:
            rank = rows.ranks[(q - n) // BLOCK_ROWS][head]
            pool = {i for i in range(q) if i <= q - 1 - width and i > q - 1 - window}
            pool -= sinks | classes | dropped
            chosen = set(sorted(pool, key=lambda i: (-float(rank[i]), i))[:budget])
            dropped |= pool - chosen
        newest = {i for i in seen if i > q - width} if local or not budget else set()
        newest |= {i for i in seen if i > q - KEEP.recent_tokens}
        result.append((sinks | classes | chosen | newest) & seen)
    return result


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("plan", HEADS, ids=lambda plan: plan.label)
def test_the_rule_spelled_out(plan, window):
    rows = random_rows(window=window)
    kept = masks_of(rows).kept(plan).expand(2, -1, -1)
    for head in range(2):
        expected = spelled_out(rows, plan, head)
        got = [set(row.nonzero()[:, 0].tolist()) for row in kept[head]]
        assert got == expected


def test_keep_sets_of_the_chain_are_nested():
    chain = [
        HeadPlan(),
        HeadPlan(special=True),
        HeadPlan(special=True, punct=True),
        HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.2)),
        HeadPlan(special=True, punct=True, frequent=Budget(ratio=0.3)),
        HeadPlan(full=True),
    ]
    masks = masks_of(random_rows())
    for small, large in zip(chain, chain[1:], strict=False):
        assert not (masks.kept(small) & ~masks.kept(large)).any()


def test_exact_tokens_are_sinks_and_the_newest():
    rows = random_rows()
    exact = masks_of(rows).exact
    last = rows.key.shape[1] - 1
    assert exact[-1].nonzero()[:, 0].tolist() == [0, 1, 2, *range(last - 5, last + 1)]
