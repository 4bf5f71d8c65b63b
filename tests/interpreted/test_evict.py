"""row_advance, score_select and kv_append in the interpreter against their references."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvcompress.kernels.kv_append import reference as append
from kvcompress.kernels.row_advance import reference as advance
from kvcompress.kernels.score_select import reference as select
from tests.kernels import evict_cases

REFERENCES = SimpleNamespace(
    row_advance=advance.row_advance,
    score_select=select.score_select,
    kv_append=append.kv_append,
)


@pytest.mark.parametrize(
    ("vote", "mean"), [("none", False), ("one", False), ("one", True), ("index", True)]
)
def test_eviction_equals_its_reference(vote, mean):
    from kvcompress.kernels.kv_append.triton import kv_append
    from kvcompress.kernels.row_advance.triton import row_advance
    from kvcompress.kernels.score_select.triton import score_select

    kernels = SimpleNamespace(
        row_advance=row_advance, score_select=score_select, kv_append=kv_append
    )
    ours = evict_cases.run(kernels, vote, mean)
    theirs = evict_cases.run(REFERENCES, vote, mean)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # sums over two queries in another order
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-6, msg=name)


def test_the_case_shows_what_it_should():
    """Equal ranks, a dropped class token, an untouched padded row, a segment without slots."""
    left = evict_cases.run(REFERENCES, "none", False)
    before = [evict_cases.group(evict_cases.HEADS, 0), evict_cases.group(evict_cases.UNSCORED, 3)]
    taken = {
        number: (left[f"group {number}_position"] != held.position).nonzero()[:, 0].tolist()
        for number, (held, *_) in enumerate(before)
    }
    # row 0 gives up one slot in each head that has slots; rows 1 and 2 have nothing that leaves
    assert left["advanced_notes"].tolist() == [[4, 55, 1], [4, -1, 0], [2, -1, 1]]
    assert len(taken[0]) == 2
    assert len(taken[1]) == 2
    slot = taken[0][1]
    assert before[0][0].score[slot] == 0.25  # equal to the leaving token's: the stored one goes
    assert left["group 0_score"][slot] == 0.25
    special = taken[0][0]
    assert left["group 0_score"][special] == evict_cases.SPECIAL_SCORE
    assert left["advanced_granted"].tolist()[0] == [9, 60, 0, 12, 14]
