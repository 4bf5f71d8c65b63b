import io
import json
import random

import pytest
import torch
from rich.console import Console

from kvcompress.accounting import kv_bytes
from kvcompress.cli.app import main
from kvcompress.errors import PlanError, UnsupportedModelError
from kvcompress.evaluate.compare import Row
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.session import Session
from kvcompress.evaluate.workloads import WORKLOADS, make_workloads
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.evaluate.workloads_run import reference_logits, run_workload
from kvcompress.evaluate.workloads_table import beside, compare_workloads, workload_table
from kvcompress.measure.stats import interval, paired
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.model.families import shape_of

EVERYTHING = 10**6
SMALL = {"notes": 6, "instructions": 10, "max_words": 2, "long_words": (3, 4), "windows": 0}


@pytest.fixture(scope="module")
def draw(tiny_tokenizer, text_file):
    """Byte tokens make long documents of few words."""

    def make(*names, **settings):
        given = {"samples": settings.pop("samples", 8), "seed": settings.pop("seed", 0)}
        sizes = Sizes(**{"context_tokens": 700, "max_position": 500, **SMALL, **settings})
        return make_workloads(tiny_tokenizer, sizes, names=names, text=text_file, **given)

    return make


@pytest.fixture(scope="module")
def tiny_suites(tiny_tokenizer, text_file):
    """One of each that fits the 256 positions of `tiny_llama`."""
    made = make_workloads(
        tiny_tokenizer,
        Sizes(
            170,
            256,
            windows=2,
            continuation_tokens=24,
            notes=2,
            instructions=3,
            max_words=1,
            long_words=(1, 2),
        ),
        samples=2,
        text=text_file,
    )
    return {suite.workload: suite for suite in made}


def whole(model, **settings):
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, HeadPlan(full=True, k_dtype="model", v_dtype="model"), **settings)


def text_of(tokenizer, document):
    return [tokenizer.decode(part) for part in (document.prompt, document.generated)]


# ---- what is drawn
def test_the_answer_to_every_question_stands_in_its_document(draw, tiny_tokenizer):
    for suite in draw(*WORKLOADS):
        assert len(suite.samples) == 8
        for sample in suite.samples:
            shown = "".join(text_of(tiny_tokenizer, suite.documents[sample.document]))
            for question in sample.questions:
                line = f"{question.text.replace('Ask', 'Note')}{question.answer}\n"
                assert shown.count(line) == 1
                place = shown.index(line) - len("<s>")
                assert question.depth == pytest.approx(place / len(shown), abs=0.02)


@pytest.mark.parametrize("name", WORKLOADS)
def test_documents_have_the_length_that_was_asked_for(draw, name):
    (suite,) = draw(name)
    wanted = 1000 if name == "beyond" else 700
    assert suite.context_tokens == wanted
    lengths = [len(each.prompt) + len(each.generated) for each in suite.documents]
    assert wanted - 60 <= min(lengths) <= max(lengths) <= wanted + 1  # words are not cut


def test_the_second_turn_never_asks_the_first_note_again(draw, tiny_tokenizer):
    (suite,) = draw("second_turn")
    for sample in suite.samples:
        (prompt, _) = text_of(tiny_tokenizer, suite.documents[sample.document])
        _, *asked = prompt.split("Ask: ")
        (turn,) = asked
        assert prompt.count(turn) == 2 and turn.endswith(".\n")  # the note, and the turn
        (question,) = sample.questions
        assert not turn.startswith(question.text.removeprefix("Ask: "))


def test_long_spans_have_their_words(draw):
    (suite,) = draw("long_span", long_words=(9, 16), notes=3, samples=12)
    lengths = {len(sample.questions[0].answer.split()) for sample in suite.samples}
    assert lengths <= set(range(9, 17)) and len(lengths) > 2


def test_notes_beyond_the_range_lie_in_the_newest_quarter(draw):
    (suite,) = draw("beyond")
    assert all(sample.questions[0].depth >= 0.74 for sample in suite.samples)
    assert suite.beyond and suite.chunk_tokens == 250


def test_a_long_generation_is_mostly_generated_and_asks_both_parts(draw):
    (suite,) = draw("long_generation", samples=12)
    assert len({len(each.generated) for each in suite.documents}) == 1
    for each in suite.documents:
        assert 100 <= len(each.prompt) <= 160
    depths = [sample.questions[0].depth for sample in suite.samples]
    assert min(depths) < 0.2 < max(depths)


def test_a_sample_of_instructions_is_a_document_with_several_questions(draw):
    (suite,) = draw("instructions")
    assert [sample.document for sample in suite.samples] == list(range(8))
    assert {len({q.text for q in sample.questions}) for sample in suite.samples} == {4}


def test_the_same_seed_gives_the_same_suites(draw):
    assert draw("hidden", "beyond") == draw("hidden", "beyond")
    assert draw("hidden", seed=1) != draw("hidden")
    assert draw("instructions", "hidden")[1] == draw("hidden")[0]


def test_an_unknown_workload_is_refused_with_the_known_ones(draw):
    with pytest.raises(ValueError, match="unknown workload hiden: choose from hidden, second_turn"):
        draw("hiden")


# ---- what is scored
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_model_that_reads_everything_is_right_and_one_that_reads_nothing_wrong(
    draw, reader, tiny_tokenizer, name
):
    (suite,) = draw(name, samples=4)
    found = run_workload(reader(EVERYTHING), tiny_tokenizer, suite)
    assert found.hits == (1.0,) * 4
    lengths = [sum(len(q.answer) for q in sample.questions) for sample in suite.samples]
    assert found.output_tokens == tuple(lengths)
    assert run_workload(reader(1), tiny_tokenizer, suite).hits == (0.0,) * 4


def test_a_sample_counts_the_share_of_its_questions(draw, reader, tiny_tokenizer):
    (suite,) = draw("instructions", samples=3)
    memory = 350  # characters before the end of what is asked and answered so far
    found = run_workload(reader(memory), tiny_tokenizer, suite)
    for sample, hit in zip(suite.samples, found.hits, strict=True):
        text = text_of(tiny_tokenizer, suite.documents[sample.document])[0]
        kept = []
        for question in sample.questions:
            whole_text = text + question.text + question.answer
            start = text.index(question.text.replace("Ask", "Note"))
            kept.append(start >= len(whole_text) - memory)
        assert hit == sum(kept) / 4
    assert 0 < sum(found.hits) < 3


def test_only_the_second_answer_is_scored(draw, reader, tiny_tokenizer):
    """A reader that forgets the document still sees the first turn, which earns nothing."""
    (suite,) = draw("second_turn", samples=4)
    turn = max(len(text_of(tiny_tokenizer, each)[0].split("Ask: ")[1]) for each in suite.documents)
    assert run_workload(reader(turn + 30), tiny_tokenizer, suite).hits == (0.0,) * 4


def test_a_long_generation_goes_through_the_decode_path(
    tiny_llama, tiny_tokenizer, tiny_suites, monkeypatch
):
    suite = tiny_suites["long_generation"]
    lengths = []
    feed = Session.feed
    monkeypatch.setattr(
        Session, "feed", lambda self, tokens: lengths.append(tokens.shape[1]) or feed(self, tokens)
    )
    inserted = []
    from kvcompress.runtime.layer import intake
    from kvcompress.runtime.step import cpu as fused

    # without kernels, with them
    for owner, name in ((intake, "store_token"), (fused.FusedStep, "run")):
        take = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, take=take: inserted.append(1) or take(*args))
    run_workload(tiny_llama, tiny_tokenizer, suite, whole(tiny_llama))
    steps = len(suite.documents[0].generated)
    assert steps == pytest.approx(136, abs=8)
    assert set(lengths) == {1} and len(lengths) >= steps
    assert len(inserted) >= 2 * steps  # layers


# ---- plans
@pytest.mark.parametrize("name", WORKLOADS)
def test_nothing_changes_where_nothing_is_compressed(tiny_llama, tiny_tokenizer, tiny_suites, name):
    suite = tiny_suites[name]
    reference = run_workload(tiny_llama, tiny_tokenizer, suite)
    plan = whole(tiny_llama, max_position=600)
    ours = run_workload(tiny_llama, tiny_tokenizer, suite, plan)
    assert (ours.hits, ours.output_tokens) == (reference.hits, reference.output_tokens)
    assert reference.target is None and ours.target == "by hand"
    if name not in ("hidden", "beyond"):
        assert ours.kl_nats is ours.perplexity is ours.flips is None
        return
    # float32 logits agree to about 1e-6, and KL is quadratic in their difference
    assert max(map(abs, ours.kl_nats)) < 1e-6 and set(reference.kl_nats) == {0.0}
    assert set(ours.flips) == {0.0}
    assert ours.perplexity == pytest.approx(reference.perplexity, rel=1e-4)
    assert len(ours.perplexity) == (1 if name == "beyond" else 2)


def test_perplexity_and_kl_are_those_of_plain_forwards(tiny_llama, tiny_tokenizer, tiny_suites):
    """Per window, against one forward of the whole window."""
    suite = tiny_suites["hidden"]
    plan = uniform(shape_of(tiny_llama.config, tiny_llama.dtype), HeadPlan())  # sinks and newest
    known = reference_logits(tiny_llama, tiny_tokenizer, suite)
    ours = run_workload(tiny_llama, tiny_tokenizer, suite, plan, reference=known)
    with torch.inference_mode():
        logits = tiny_llama(suite.windows).logits[:, 169:-1].double()
    torch.testing.assert_close(known.double(), logits, atol=1e-4, rtol=1e-3)
    target = suite.windows[:, 170:]
    loss = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none").mean(1)
    reference = run_workload(tiny_llama, tiny_tokenizer, suite)
    assert reference.perplexity == pytest.approx(loss.exp().tolist(), rel=1e-4)
    assert min(ours.kl_nats) > 0 and max(ours.flips) > 0


def test_bytes_are_those_of_the_accounting(tiny_llama, tiny_tokenizer, tiny_suites):
    shape = shape_of(tiny_llama.config, tiny_llama.dtype)
    plan = uniform(shape, HeadPlan(local=Budget(tokens=40)))
    for name in ("long_generation", "instructions"):
        suite = tiny_suites[name]
        seen = [len(each.prompt) + len(each.generated) for each in suite.documents]
        assert len(seen) == (2 if name == "instructions" else 1)
        found = run_workload(tiny_llama, tiny_tokenizer, suite, plan)
        assert found.kv_bytes == sum(kv_bytes(plan, each, 1) for each in seen) // len(seen)
        assert found.kv_bytes_bf16 == 2 * 2 * 2 * 16 * 2 * round(sum(seen) / len(seen))
        assert found.kv_ratio == found.kv_bytes / found.kv_bytes_bf16


def test_the_batch_size_does_not_change_the_result(tiny_llama, tiny_tokenizer, draw):
    """Questions of one document in several batches, documents of one batch together."""
    small = {"context_tokens": 150, "instructions": 2, "max_words": 1, "samples": 3}
    (suite,) = draw("instructions", **small)
    plan = whole(tiny_llama)
    ones, many = (
        run_workload(tiny_llama, tiny_tokenizer, suite, plan, batch_rows=rows) for rows in (1, 16)
    )
    assert (ones.hits, ones.output_tokens) == (many.hits, many.output_tokens)


def test_a_prompt_ends_before_anything_is_asked(tiny_llama, tiny_tokenizer, tiny_suites):
    """A cache that wants to finish its prompt is told once per prefill, before rows are copied."""
    from kvcompress.runtime.cache.cache import CompressedCache

    told = []

    class Cache(CompressedCache):
        def finish_prompt(self, model):
            told.append((model, int(self.get_seq_length())))

        def batch_select_indices(self, indices):
            assert told
            super().batch_select_indices(indices)

    suite = tiny_suites["instructions"]
    plan = whole(tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvcompress.runtime.cache.new.CompressedCache", Cache)
        run_workload(tiny_llama, tiny_tokenizer, suite, plan)
    assert told == [(tiny_llama, max(len(each.prompt) for each in suite.documents))]


def test_relative_positions_serve_what_is_longer_than_trained(
    tiny_llama, tiny_tokenizer, tiny_suites, monkeypatch
):
    """And the prompt comes in parts that the model was trained on."""
    lengths = []
    forward = Session._forward
    monkeypatch.setattr(
        Session,
        "_forward",
        lambda self, ids, *rest, **more: (
            lengths.append(ids.shape[1]) or forward(self, ids, *rest, **more)
        ),
    )
    shape = shape_of(tiny_llama.config, tiny_llama.dtype)
    plan = uniform(shape, HeadPlan(local=Budget(tokens=60)), positions="relative")
    found = run_workload(tiny_llama, tiny_tokenizer, tiny_suites["beyond"], plan)
    assert found.context_tokens == 512 and found.kl_nats[0] > 0
    assert attached(tiny_llama) is None
    # documents, windows, and windows of the reference: three whole parts and a rest each
    assert max(lengths) == 128 and lengths.count(128) >= 9


def test_positions_that_the_model_lacks_are_named(tiny_tokenizer, tiny_suites):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2
    )
    with pytest.raises(UnsupportedModelError, match="beyond needs 512 positions"):
        run_workload(GPT2LMHeadModel(config).eval(), tiny_tokenizer, tiny_suites["beyond"])


def test_a_context_beyond_the_model_s_positions_is_refused(tiny_llama, tiny_tokenizer, draw):
    (suite,) = draw("hidden")
    with pytest.raises(ValueError, match=r"hidden: context.* has positions for 256: use a context"):
        run_workload(tiny_llama, tiny_tokenizer, suite)


def test_a_plan_of_another_model_is_refused(tiny_llama, tiny_tokenizer, tiny_suites):
    other = whole(tiny_llama)
    other = other.model_copy(update={"model": other.model.model_copy(update={"config_hash": "x"})})
    with pytest.raises(PlanError, match="the plan is for another model"):
        run_workload(tiny_llama, tiny_tokenizer, tiny_suites["hidden"], other)


# ---- the demo model: hits that a plan loses
@pytest.fixture(scope="module")
def demo(demo_model_dir):
    from kvcompress.profile.source import load_source

    return load_source(str(demo_model_dir), "cpu")


def test_sinks_and_newest_tokens_alone_forget_what_the_full_cache_recalls(demo):
    model, tokenizer = demo
    shape = shape_of(model.config, model.dtype)
    sizes = Sizes(600, 1024, windows=0, notes=6, max_words=3)
    (suite,) = make_workloads(tokenizer, sizes, names=["hidden"], samples=6)
    plans = [None, uniform(shape, HeadPlan(full=True)), uniform(shape, HeadPlan())]
    full, int8, bare = (run_workload(model, tokenizer, suite, plan) for plan in plans)
    assert full.score >= 0.8 and int8.hits == full.hits
    assert bare.score <= 0.2
    difference, (_, high) = paired(bare.hits, full.hits)
    assert difference == pytest.approx(bare.score - full.score) and high < 0


# ---- intervals
def test_the_interval_of_a_known_sample():
    mean, (low, high) = interval([1.0] * 50 + [0.0] * 50)
    assert mean == 0.5
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.015)  # sd of the mean is 0.05
    with pytest.raises(ValueError, match="no samples to score"):
        interval([])


def test_pairing_makes_the_interval_narrower():
    rng = random.Random(0)
    theirs = [float(rng.random() < 0.5) for _ in range(60)]
    ours = [0.0 if index < 2 else hit for index, hit in enumerate(theirs)]
    theirs[:2] = [1.0, 1.0]
    difference, (low, high) = paired(ours, theirs)
    assert difference == pytest.approx(-2 / 60)
    _, (alone_low, alone_high) = interval(ours)
    assert high - low < 0.4 * (alone_high - alone_low)
    with pytest.raises(ValueError, match="59 samples against 60"):
        paired(ours[1:], theirs)


# ---- side by side
def outcome(workload="hidden", hits=(1.0, 0.0, 1.0, 1.0), **values):
    defaults = {
        "target": None, "context_tokens": 960, "seed": 0, "output_tokens": (3, 5, 4, 4),
        "kv_bytes": 2048, "kv_bytes_bf16": 8192,
    }  # fmt: skip
    return WorkloadOutcome(workload=workload, hits=hits, **{**defaults, **values})


def test_the_table_shows_scores_with_intervals_and_fits_100_columns():
    reference = outcome(kl_nats=(0.0, 0.0), perplexity=(2.0, 8.0), flips=(0.0, 0.0))
    ours = outcome(
        hits=(1.0, 0.0, 0.0, 1.0), kl_nats=(0.1, 0.3), perplexity=(4.0, 9.0), flips=(0.0, 0.25)
    )
    rows = [beside("reference", reference), beside("byte plan 1/4 (bundle)", ours, reference)]
    rows.append(beside("reference", outcome("long_generation")))
    assert (rows[1].score, rows[1].difference) == (0.5, -0.25)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(workload_table(rows))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 100
    (line,) = [x.split() for x in lines if x.lstrip().startswith("byte plan")]
    expected = "byte plan 1/4 (bundle) 0.250 50.0 0-100 -25.0 -75…+0 4.0 0.2000 6.00 12.5"
    assert line == expected.split()
    assert any("D5 long_generation: a short prompt" in line for line in lines)


def test_an_outcome_survives_json():
    found = outcome(kl_nats=(0.5,), perplexity=(2.0,), flips=(0.0,))
    assert WorkloadOutcome.model_validate_json(found.model_dump_json()) == found


def test_rows_stand_behind_their_reference(tiny_llama, tiny_tokenizer, tiny_suites):
    suites = [tiny_suites["hidden"], tiny_suites["instructions"]]
    done = []
    rows = [Row("whole", whole(tiny_llama), None)]
    found = list(compare_workloads(tiny_llama, tiny_tokenizer, suites, rows, done.append))
    assert [(row.outcome.workload, row.name) for row in found] == [
        (name, row) for name in ("hidden", "instructions") for row in ("reference", "whole")
    ]
    assert done == [1, 2, 3, 4]
    assert found[0].difference is None and found[1].difference == 0.0
    assert found[0].outcome == run_workload(tiny_llama, tiny_tokenizer, suites[0])


def test_the_command_measures_workloads(tiny_model_dir, tiny_llama, text_file, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(whole(tiny_llama, target="everything").to_json())
    options = ["--context", "210", "--samples", "1", "--text", str(text_file)]
    command = ["eval", str(tiny_model_dir), "--plan", str(tmp_path), "--workloads"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "hidden,nothing", *options])
    assert "unknown workload nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # twelve notes do not fit 210 bytes
        main([*command, "hidden", *options])
    assert "ask for fewer or shorter notes" in capsys.readouterr().err


def test_the_command_prints_json(demo_model_dir, capsys):
    options = ["--samples", "1", "--windows", "0", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main(["eval", str(demo_model_dir), "--workloads", "hidden,second_turn", *options])
    hidden, second = json.loads(capsys.readouterr().out)
    assert hidden["name"] == second["name"] == "reference"
    assert (hidden["outcome"]["workload"], second["outcome"]["workload"]) == (
        "hidden",
        "second_turn",
    )
    assert hidden["score"] in (0.0, 1.0) and hidden["difference"] is None
    assert len(hidden["outcome"]["hits"]) == 1
