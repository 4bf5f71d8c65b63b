import random

import pytest

from kvcompress.tasks.documents import (
    MULTI_KEYS,
    TASKS,
    lay_out,
    make_samples,
    recall_notes,
)
from kvcompress.tasks.words import COUNT_WORDS, KEY_WORDS, VALUE_WORDS


def words(text: str) -> int:
    """A tokenizer in which white space counts too: every word, line end and begin token is one."""
    return 1 + len(text.split()) + text.count("\n")


def draw(filler, **settings):
    defaults = {"samples": 10, "context_tokens": 500, "filler": filler}
    return make_samples(words, **{**defaults, **settings})


def line_of(sample):
    """The note that answers a recall sample."""
    return f"{sample.question.replace('Ask', 'Note')}{sample.answer}\n"


def test_words_are_distinct_and_lists_disjoint():
    every = [*KEY_WORDS, *VALUE_WORDS, *COUNT_WORDS]
    assert len(set(every)) == len(every)
    assert all(word.isalpha() and word.islower() for word in every)


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_stands_in_the_context_at_the_stated_depth(filler, seed):
    for sample in draw(filler, tasks=["recall"], seed=seed):
        place = sample.context.index(line_of(sample))
        assert sample.depth == place / len(sample.context)
        assert sample.context.count(line_of(sample)) == 1
        assert sample.context[place - 1] == "\n" or place == 0
        assert sample.span_words == len(sample.answer.split())


@pytest.mark.parametrize("seed", range(4))
def test_one_document_asks_each_key_once_and_its_notes_cover_the_depth(filler, seed):
    samples = draw(filler, tasks=["recall"], seed=seed, samples=12)
    assert len({s.context for s in samples}) == 1
    seconds = [sample.question.split()[-1] for sample in samples]
    assert len(set(seconds)) == 12
    fifths = {min(4, int(sample.depth * 5)) for sample in samples}
    assert fifths == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context_tokens", (300, 500, 900))
def test_a_context_fills_the_length_that_was_asked_for(filler, task, context_tokens):
    drawn = draw(filler, tasks=[task], context_tokens=context_tokens, max_words=4)
    lengths = [words(sample.context) for sample in drawn]
    assert max(lengths) <= context_tokens
    assert min(lengths) >= context_tokens - 6  # a piece of text may need a line end of its own


def test_a_context_longer_than_the_filler_repeats_it(filler):
    (sample,) = draw(filler, tasks=["recall"], samples=1, context_tokens=3000)
    assert words(sample.context) >= 2994


def test_the_same_seed_gives_the_same_samples_and_another_one_others(filler):
    assert draw(filler, seed=3) == draw(filler, seed=3)
    assert draw(filler, seed=3) != draw(filler, seed=4)


def test_each_task_gives_the_number_asked_for_whatever_the_others(filler):
    everything = draw(filler, samples=7)
    assert [s.task for s in everything] == [task for task in TASKS for _ in range(7)]
    recall_only = draw(filler, samples=7, tasks=["recall"])
    assert everything[:7] == recall_only


def test_spans_reach_from_one_word_to_the_longest(filler):
    spans = {s.span_words for s in draw(filler, tasks=["recall"], samples=120, max_words=16)}
    assert {1, 16} <= spans <= set(range(1, 17))


def test_multi_key_asks_several_distinct_keys_of_its_document(filler):
    for sample in draw(filler, tasks=["multi_key"]):
        turns = [(sample.question, sample.answer), *sample.follow_ups]
        assert len({question for question, _ in turns}) == MULTI_KEYS
        for question, answer in turns:
            assert f"{question.replace('Ask', 'Note')}{answer}\n" in sample.context


def test_a_hop_leads_over_its_link_to_the_value(filler):
    for sample in draw(filler, tasks=["hops"], notes_per_document=8, max_words=4):
        start = sample.question.removeprefix("Follow: ")
        (link,) = [x for x in sample.context.split("\n") if x.startswith(f"Link: {start} ")]
        middle = link.removeprefix(f"Link: {start} ").rstrip(".")
        (note,) = [x for x in sample.context.split("\n") if x.startswith(f"Note: {middle} ")]
        assert sample.answer == " " + note.removeprefix("Note: ")


def test_a_count_is_the_number_of_marks(filler):
    for sample in draw(filler, tasks=["count"]):
        noun = sample.question.removeprefix("Count: ")
        marks = sample.context.split("\n").count(f"Mark: {noun}.")
        assert sample.answer == f" {COUNT_WORDS[marks]}."


def test_notes_that_do_not_fit_are_refused(filler):
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"12 notes need \d+ tokens, more than the 20"):
        lay_out(rng, recall_notes(rng, 12, 8), filler, 20, words)


def test_an_unknown_task_is_refused_with_the_known_ones(filler):
    with pytest.raises(ValueError, match="unknown task recal: choose from recall, multi_key"):
        draw(filler, tasks=["recal"])
