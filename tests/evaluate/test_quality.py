import dataclasses

import pytest
import torch

from kvcompress.accounting import kv_bytes
from kvcompress.errors import PlanError
from kvcompress.evaluate.quality import evaluate, measure
from kvcompress.evaluate.suite import make_suite
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.model.attached import attached
from kvcompress.runtime.model.families import shape_of

EVERYTHING = 10**6


@pytest.fixture(scope="module")
def recall_suite(tiny_tokenizer, text_file):
    """Byte tokens make long contexts, so answers are short and no text is scored."""
    suite = make_suite(
        tiny_tokenizer,
        tasks=["recall", "multi_key"],
        samples=12,
        context_tokens=1200,
        windows=0,
        max_words=3,
        text=text_file,
    )
    return dataclasses.replace(suite, batch_rows=9)


@pytest.fixture(scope="module")
def tiny_suite(tiny_tokenizer, text_file):
    return make_suite(
        tiny_tokenizer,
        tasks=["recall"],
        samples=4,
        context_tokens=160,
        windows=3,
        continuation_tokens=40,
        notes_per_document=2,
        max_words=1,
        text=text_file,
    )


def full(model, dtype):
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, HeadPlan(full=True, k_dtype=dtype, v_dtype=dtype))


def test_a_model_that_reads_all_of_its_context_recalls_everything(
    reader, tiny_tokenizer, recall_suite
):
    report = evaluate(reader(EVERYTHING), tiny_tokenizer, None, None, recall_suite)
    for found in (report.visible, report.hidden):
        assert found.exact == 1.0 and found.interval == (1.0, 1.0)
        assert found.by_task == {"recall": 1.0, "multi_key": 1.0}
        assert found.multi_key == 1.0
    lengths = [len(s.answer + "".join(a for _, a in s.follow_ups)) for s in recall_suite.samples]
    assert report.visible.output_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert report.text is None


def test_a_model_that_reads_nothing_recalls_nothing_and_runs_on(
    reader, tiny_tokenizer, recall_suite
):
    report = evaluate(reader(1), tiny_tokenizer, None, None, recall_suite)
    assert report.visible.exact == report.hidden.exact == 0.0
    assert report.visible.multi_key == 0.0
    turns = [
        len(s.answer) + 2 + sum(len(a) + 2 for _, a in s.follow_ups) for s in recall_suite.samples
    ]
    assert report.hidden.output_tokens == pytest.approx(sum(turns) / len(turns))


def test_a_model_that_forgets_the_first_half_recalls_the_last_fifths_only(
    reader, tiny_tokenizer, recall_suite
):
    report = evaluate(reader(600), tiny_tokenizer, None, None, recall_suite)
    first, second, _, fourth, last = report.visible.by_depth
    assert (first, second, fourth, last) == (0.0, 0.0, 1.0, 1.0)


def test_nothing_changes_where_nothing_is_compressed(tiny_llama, tiny_tokenizer, tiny_suite):
    reference = measure(tiny_llama, tiny_tokenizer, tiny_suite)
    plan = full(tiny_llama, "model")
    ours = measure(tiny_llama, tiny_tokenizer, tiny_suite, plan, reference=reference)
    assert ours.visible == reference.visible
    assert ours.hidden == reference.hidden
    assert ours.report.text.tokens == 120
    assert ours.report.text.flips == 0.0
    # float32 logits agree to about 1e-6, and KL is quadratic in their difference
    assert abs(ours.report.text.kl_nats) < 1e-6
    assert ours.report.text.perplexity == pytest.approx(reference.report.text.perplexity, rel=1e-5)
    assert ours.report.visible.difference == 0.0
    assert reference.report.text.kl_nats == 0.0


def test_perplexity_of_the_reference_is_that_of_one_plain_forward(
    tiny_llama, tiny_tokenizer, tiny_suite
):
    report = evaluate(tiny_llama, tiny_tokenizer, None, None, tiny_suite)
    with torch.inference_mode():
        logits = tiny_llama(tiny_suite.windows).logits[:, 159:-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tiny_suite.windows[:, 160:].flatten()
    )
    assert report.text.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


def test_coarser_codes_and_fewer_tokens_move_the_output(tiny_llama, tiny_tokenizer, tiny_suite):
    shape = shape_of(tiny_llama.config, tiny_llama.dtype)
    short = uniform(shape, HeadPlan(local=Budget(tokens=20)))
    reference = measure(tiny_llama, tiny_tokenizer, tiny_suite)
    kl = [
        measure(
            tiny_llama, tiny_tokenizer, tiny_suite, plan, reference=reference
        ).report.text.kl_nats
        for plan in (full(tiny_llama, "int8"), full(tiny_llama, "int4"), short)
    ]
    assert 0 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize("dtype", ("model", "int8", "int4"))
def test_bytes_are_those_of_the_accounting(tiny_llama, tiny_tokenizer, tiny_suite, dtype):
    plan = full(tiny_llama, dtype)
    report = evaluate(tiny_llama, tiny_tokenizer, plan, None, tiny_suite)
    assert report.kv_bytes == report.kv_bytes_accounted == kv_bytes(plan, 160, 1)
    assert report.kv_bytes_bf16 == 2 * 2 * 2 * 16 * 2 * 160  # K and V, layers, heads, dim, bytes
    assert report.kv_ratio == report.kv_bytes / report.kv_bytes_bf16


def test_the_reference_holds_the_full_cache(tiny_llama, tiny_tokenizer, tiny_suite):
    report = evaluate(tiny_llama, tiny_tokenizer, None, None, tiny_suite)
    assert report.kv_bytes == 2 * report.kv_bytes_bf16  # the tiny model is float32
    assert report.kv_bytes_accounted is None
    assert report.weights_bytes == sum(p.nbytes for p in tiny_llama.parameters()) + sum(
        b.nbytes for b in tiny_llama.buffers()
    )


def test_the_batch_size_does_not_change_the_result(tiny_llama, tiny_tokenizer, tiny_suite):
    plan = full(tiny_llama, "int8")
    one_by_one = dataclasses.replace(tiny_suite, batch_rows=1)
    ours = measure(tiny_llama, tiny_tokenizer, tiny_suite, plan)
    theirs = measure(tiny_llama, tiny_tokenizer, one_by_one, plan)
    assert ours.visible == theirs.visible
    assert ours.hidden == theirs.hidden
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-3)


def test_the_model_is_left_as_it_was_found(tiny_llama, tiny_tokenizer, tiny_suite):
    from copy import deepcopy

    model = deepcopy(tiny_llama)
    own = full(model, "int8")
    attach(model, own)
    measure(model, tiny_tokenizer, tiny_suite, full(model, "int4"))
    assert attached(model) == (own, None)
    before = deepcopy(tiny_llama)
    measure(before, tiny_tokenizer, tiny_suite, own)
    assert attached(before) is None


def test_a_plan_of_another_model_is_refused(tiny_llama, tiny_tokenizer, tiny_suite):
    other = full(tiny_llama, "int8")
    other = other.model_copy(update={"model": other.model.model_copy(update={"config_hash": "x"})})
    with pytest.raises(PlanError, match="the plan is for another model"):
        measure(tiny_llama, tiny_tokenizer, tiny_suite, other)


def test_a_context_beyond_the_model_s_positions_is_refused(tiny_llama, tiny_tokenizer, text_file):
    suite = make_suite(
        tiny_tokenizer, tasks=[], context_tokens=230, continuation_tokens=40, text=text_file
    )
    with pytest.raises(ValueError, match=r"reach 270 tokens, .* 256: .* at most 216 tokens"):
        measure(tiny_llama, tiny_tokenizer, suite)
