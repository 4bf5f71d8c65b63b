"""What holds for every registered scorer: shapes, bounds, and that neighbours do not matter."""

import subprocess
import sys

import pytest
import torch

from kvcompress.errors import PlanError
from kvcompress.evict.keepset import PUNCT_SCORE, SPECIAL_SCORE
from kvcompress.evict.scorers import SCORERS, QueryRows, newest, scorer
from tests.evict.prompts import prompt, ranks_of, scores_of

NAMES = sorted(SCORERS)
# what a scorer was trained for, or hears at a second reading, is beyond a random prompt
READY = [n for n in NAMES if not scorer(n).trained and "repeat" not in scorer(n).needs]
PLACED = {"random", "random_generated"}  # a token's number hangs on its position, pads counted
LARGEST = 2.0**39  # ranks from here on belong to the tiers of the keep rule


def with_budget(data):
    data.budget = torch.tensor([[6, 2], [9, 4]])[: len(data.pads)]
    return data


def test_nothing_is_imported_to_know_the_names():
    code = (
        "import sys; from kvcompress.registry import known_scorer; known_scorer('tova');"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(PlanError, match="unknown scorer 'best'; choose among .*tova"):
        scorer("best")


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_known(name):
    assert scorer(name).needs <= {"output_weight", "hidden", "rotation", "repeat"}
    assert scorer(name).query_rows >= 0
    assert (scorer(name).__doc__ or type(scorer(name)).__doc__ or "").strip()


@pytest.mark.parametrize("name", READY)
def test_scores_of_a_prompt(name):
    data = with_budget(prompt(1, pads=(0, 7)))
    score, rank = scores_of(scorer(name), data), ranks_of(scorer(name), data)
    assert score.shape == rank.shape == (2, 2, 30)
    assert score.dtype == rank.dtype == torch.float32
    assert score.isfinite().all() and rank.isfinite().all()
    assert rank.abs().max() < LARGEST
    assert torch.equal(rank, ranks_of(scorer(name), with_budget(prompt(1, pads=(0, 7)))))
    own = rank.masked_fill(~data.valid[:, None], torch.nan)
    assert (own[0].unique().numel() > 5) and not own[0].isnan().any()


@pytest.mark.parametrize("name", READY)
def test_half_precision_keys_give_float32_scores(name):
    data = prompt(2)
    exact = ranks_of(scorer(name), data)
    for part in ("query", "key", "value"):
        setattr(data, part, getattr(data, part).bfloat16())
    data.output_weight = data.output_weight.float()
    tokens = data.tokens(scorer(name).query_rows)
    score = scorer(name).finish(scorer(name).arrive(tokens).clone(), tokens)
    assert score.dtype == torch.float32 and score.isfinite().all()
    if not scorer(name).uses_attention:
        assert torch.corrcoef(torch.stack([score.flatten(), exact.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("block", [1, 7, 16])
def test_rows_in_blocks_say_what_they_say_together(name, block):
    data = with_budget(prompt(3, pads=(0, 9)))
    whole = ranks_of(scorer(name), data, score_rows=12)
    parts = ranks_of(scorer(name), data, score_rows=12, block=block)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[1][:, 9:], whole[1][:, 9:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("settings", [{}, {"score_rows": 8}, {"score_rows": 8, "pool_tokens": 5}])
def test_a_padded_row_ranks_as_it_does_alone(name, settings):
    data = with_budget(prompt(4, pads=(11, 3)))
    together = ranks_of(scorer(name), data, **settings)
    if name not in PLACED:
        for b, pad in enumerate(data.pads):
            alone = ranks_of(scorer(name), data.row(b), **settings)[0]
            torch.testing.assert_close(together[b, :, pad:], alone, rtol=2e-5, atol=2e-5)
    junk = with_budget(prompt(4, pads=(11, 3)))
    for part in (junk.key, junk.value):
        part[0, :, :11] = 100.0
        part[1, :, :3] = -50.0
    junk.query[0, :, :, :11] = 30.0
    again = ranks_of(scorer(name), junk, **settings)
    for b, pad in enumerate(data.pads):
        torch.testing.assert_close(again[b, :, pad:], together[b, :, pad:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READY)
def test_class_tokens_stay_class_tokens_when_votes_are_added(name):
    """A merge that replaces is guarded by the runtime; every other leaves the sentinels alone."""
    found = scorer(name)
    score = torch.tensor([[SPECIAL_SCORE, PUNCT_SCORE, 1.0]])
    rows = QueryRows(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1))
    votes = found.collect(torch.rand(1, 2, 1, 3), rows)
    if name != "tova":
        assert torch.equal(found.merge(score, votes)[0, :2], score[0, :2])


@pytest.mark.parametrize("name", READY)
def test_decoded_tokens_of_prompt_scorers_come_before_the_prompt(name):
    from kvcompress.evict.scorers.base import PromptScorer

    if not isinstance(scorer(name), PromptScorer):
        return
    position = torch.arange(30, 60)
    later = scorer(name).initial(torch.randn(30, 8), position, torch.zeros(30))
    assert torch.equal(later, newest(position)) and (later.diff() > 0).all()
    assert later.min() > ranks_of(scorer(name), prompt(5)).max()
    assert later.max() < LARGEST
