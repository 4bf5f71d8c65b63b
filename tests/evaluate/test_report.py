import pytest

from kvcompress.evaluate.report import Answered, recall
from kvcompress.measure.stats import interval
from kvcompress.tasks.documents import Sample

RIGHT = Answered(True, 1, 1, 3)
WRONG = Answered(False, 0, 1, 5)


def sample(task="recall", depth=0.0, span=1, follow_ups=()):
    return Sample(task, 0, "", "", "", depth, span, follow_ups)


def test_recall_is_split_by_depth_and_span():
    samples = [sample(depth=0.1, span=1), sample(depth=0.19, span=3), sample(depth=1.0, span=16)]
    found = recall(samples, [RIGHT, WRONG, RIGHT])
    assert found.exact == pytest.approx(2 / 3)
    assert found.by_depth == (0.5, None, None, None, 1.0)
    assert found.by_span == {"1": 1.0, "2-4": 0.0, "9-16": 1.0}
    assert found.output_tokens == pytest.approx(11 / 3)
    assert found.difference is None and found.multi_key is None


def test_the_headline_is_the_recall_task_and_the_others_stand_beside_it():
    chain = sample("multi_key", follow_ups=(("", ""), ("", "")))
    answered = [RIGHT, WRONG, Answered(False, 2, 3, 9)]
    found = recall([sample(), sample("count"), chain], answered)
    assert (found.samples, found.exact) == (1, 1.0)
    assert found.by_task == {"recall": 1.0, "count": 0.0, "multi_key": 0.0}
    assert found.multi_key == pytest.approx(2 / 3)


def test_the_difference_is_paired_per_sample():
    samples = [sample()] * 40
    ours, theirs = [RIGHT] * 20 + [WRONG] * 20, [RIGHT] * 21 + [WRONG] * 19
    found = recall(samples, ours, theirs)
    assert found.difference == pytest.approx(-1 / 40)
    # one sample differs: pairing makes this interval far narrower than that of either recall
    low, high = found.difference_interval
    assert -0.1 <= low <= -1 / 40 and high == 0.0
    assert found.interval[1] - found.interval[0] > 0.25


def test_the_interval_matches_the_binomial_one():
    mean, (low, high) = interval([1.0] * 80 + [0.0] * 20)
    assert mean == 0.8
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)  # sd of the mean is 0.04
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)
    assert interval([1.0] * 5) == (1.0, (1.0, 1.0))


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no samples to score"):
        recall([], [])
