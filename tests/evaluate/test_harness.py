"""lm-evaluation-harness, offline, on tasks written into a temporary folder."""

import json
import sys
from functools import partial

import pytest
import torch

from kvcompress.cli.app import main
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.harness import evaluate_harness, run_harness
from kvcompress.evaluate.serving import serving
from kvcompress.evaluate.session import Session
from kvcompress.plan import Budget, HeadPlan, uniform
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from tests.bundle.helpers import checked_here

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
num_fewshot: 0
metadata:
  version: 1.0
"""
CHOICE = """
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITE = """
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
filter_list:
  - name: stripped
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Without the harness nothing here runs; with it nothing leaves this machine."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: kvcompress[eval]")
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    """One note at the start of a text, then other text, then the question."""
    folder = tmp_path_factory.mktemp("tasks")
    values = "apple engine guitar helmet lemon magnet pencil saddle".split()
    keys = "river forest garden harbor castle meadow".split()
    text = "The statement is a simple way to write a value into the name of a class. " * 3
    with open(folder / "notes.jsonl", "w", encoding="utf-8") as file:
        for number, key in enumerate(keys):
            choices = [values[(number + step) % len(values)] for step in range(4)]
            context = f"Note: amber {key} {choices[0]}.\n{text}\nAsk: amber {key}"
            file.write(json.dumps({"context": context, "choices": choices}) + "\n")
    tasks = {
        "choice": ("multiple_choice", CHOICE),
        "write": ("generate_until", WRITE),
        "rolling": ("loglikelihood_rolling", ROLLING),
    }
    for name, (kind, rest) in tasks.items():
        head = TASK.format(name=f"notes_{name}", kind=kind, data=folder / "notes.jsonl")
        (folder / f"{name}.yaml").write_text(head + rest, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def demo(demo_model_dir):
    from kvcompress.profile.source import load_source

    return load_source(str(demo_model_dir), "cpu")


def plan_of(model, head, **settings):
    return uniform(shape_of(model.config, model.dtype), head, **settings)


def cached_lm(model, tokenizer, new_cache, batch_rows=4):
    from kvcompress.evaluate.harness import _cached_lm

    return _cached_lm(model, tokenizer, new_cache, batch_rows)


def requests():
    """Contexts of several lengths, some shared, some continuations longer than others."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    contexts = [draw(60), draw(45), draw(90), draw(1)]
    return [
        (("", ""), contexts[number], draw(length))
        for number, length in ((0, 3), (1, 1), (0, 1), (2, 7), (0, 5), (3, 12), (1, 2))
    ]


# ---- scores of single continuations
def test_with_the_full_cache_scores_are_those_of_the_harness_itself(tiny_llama, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, backend="causal")
    expected = theirs._loglikelihood_tokens(requests(), disable_tqdm=True)
    for plan in (None, plan_of(tiny_llama, HeadPlan(full=True, k_dtype="model", v_dtype="model"))):
        with serving(tiny_llama, plan, None) as new_cache:
            ours = cached_lm(tiny_llama, tiny_tokenizer, new_cache)
            found = ours._loglikelihood_tokens(requests(), disable_tqdm=True)
        # float32 logits agree to about 1e-5, and up to 12 of them are added up
        assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_told_apart(tiny_llama, tiny_tokenizer):
    context = requests()[0][1]
    with serving(tiny_llama, None, None) as new_cache:
        session = Session(tiny_llama, new_cache(), 2)
        token = session.prefill([context]).argmax(-1)
        greedy = [int(token)]
        for _ in range(3):
            token = session.feed(token[:, None])[:, -1].argmax(-1)
            greedy.append(int(token))
        other = [*greedy[:3], (greedy[3] + 1) % 200]
        lm = cached_lm(tiny_llama, tiny_tokenizer, new_cache)
        asked = [(("", ""), context, each) for each in (greedy, other)]
        found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_a_compressed_cache_scores_as_a_cache_fed_by_hand(tiny_llama, tiny_tokenizer):
    plan = plan_of(tiny_llama, HeadPlan(local=Budget(tokens=20)), sink_tokens=2)
    with serving(tiny_llama, plan, None) as new_cache:
        lm = cached_lm(tiny_llama, tiny_tokenizer, new_cache)
        found = lm._loglikelihood_tokens(requests(), disable_tqdm=True)
        for (_, context, continuation), (score, _) in zip(requests(), found, strict=True):
            cache, expected, ids = new_cache(), 0.0, torch.tensor([context])
            with torch.inference_mode():
                if (
                    len(context) > 1
                ):  # the last token is decoded, so that its logits tell of the cache
                    tiny_llama(ids[:, :-1], **as_argument(cache))
                    ids = ids[:, -1:]
                for token in continuation:
                    logits = tiny_llama(ids, **as_argument(cache)).logits[0, -1]
                    expected += logits.log_softmax(-1)[token].item()
                    ids = torch.tensor([[token]])
            # rows are padded in a batch; float32 logits then agree to about 1e-5
            assert score == pytest.approx(expected, abs=1e-3)


def test_contexts_that_are_too_long_are_cut_as_the_harness_cuts_them(tiny_llama, tiny_tokenizer):
    long = (list(range(3, 253)) * 2)[:400]
    asked = [(("", ""), long, [7, 8, 9])]
    with serving(tiny_llama, None, None) as new_cache:
        lm = cached_lm(tiny_llama, tiny_tokenizer, new_cache)
        with pytest.warns(UserWarning, match="1 of 1 contexts are longer than the model's 256"):
            ((score, _),) = lm._loglikelihood_tokens(asked, disable_tqdm=True)
        with pytest.raises(ValueError, match="a continuation of 400 tokens is longer"):
            lm._loglikelihood_tokens([(("", ""), [3], long)], disable_tqdm=True)
    with torch.inference_mode():
        logits = tiny_llama(torch.tensor([[*long, 7, 8]][0][-256:])[None]).logits[0, -3:]
    expected = logits.log_softmax(-1)[[0, 1, 2], [7, 8, 9]].sum().item()
    assert score == pytest.approx(expected, abs=1e-3)


# ---- whole tasks
def test_a_plan_that_forgets_shows_in_every_kind_of_task(demo, task_dir):
    model, tokenizer = demo
    bare = plan_of(model, HeadPlan(), recent_tokens=2, target="sinks and two tokens")
    choice, write = run_harness(
        model, tokenizer, bare, None, ["notes_choice", "notes_write"], task_dir=task_dir
    )
    assert (choice.task, choice.metric, choice.samples) == ("notes_choice", "acc", 6)
    assert choice.reference == 1.0 and choice.value <= 0.5
    low, high = choice.difference_interval
    assert low <= choice.difference == choice.value - 1.0 <= high < 0
    assert write.metric == "exact_match,stripped" and write.higher_is_better is True
    assert write.reference == 1.0 and write.value <= 0.5
    (rolling,) = run_harness(
        model, tokenizer, bare, None, ["notes_rolling"], task_dir=task_dir, limit=1
    )
    assert (rolling.metric, rolling.samples) == ("word_perplexity", 1)
    assert rolling.value > rolling.reference
    assert rolling.difference_interval is None  # not a mean over samples


def test_a_bundle_that_keeps_everything_scores_as_its_full_cache(demo_bundle, task_dir):
    choice, write = evaluate_harness(
        demo_bundle, ["notes_choice", "notes_write"], task_dir=task_dir, limit=2
    )
    for score in (choice, write):
        assert score.value == score.reference == 1.0
        assert score.difference == 0.0 and score.difference_interval == (0.0, 0.0)


@pytest.fixture(scope="module")
def demo_bundle(demo, demo_model_dir, tmp_path_factory):
    """The demo model with int8 codes of everything."""
    from kvcompress.bundle.write import export
    from kvcompress.profile.run import run
    from kvcompress.recipe import Calibration, Recipe

    model, tokenizer = demo
    folder = tmp_path_factory.mktemp("bundle")
    recipe = Recipe(calibration=Calibration(prompts=1, tokens=64))
    run(model, tokenizer, recipe, folder / "profile")
    plan = plan_of(model, HeadPlan(full=True), target="int8")
    with checked_here():
        export(demo_model_dir, folder / "profile", folder / "bundle", plan=plan)
    return folder / "bundle"


def test_the_command_prints_json(demo_bundle, task_dir, capsys):
    options = ["--harness", "notes_choice", "--task-dir", str(task_dir), "--limit", "1", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main(["eval", str(demo_bundle), *options])
    (score,) = json.loads(capsys.readouterr().out)
    assert (score["task"], score["samples"], score["value"]) == ("notes_choice", 1, 1.0)


def test_the_command_needs_one_plan(demo_model_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(demo_model_dir), "--harness", "notes_choice"])
    assert "--harness compares one plan with the full cache" in capsys.readouterr().err


# ---- what a user can do wrong
def test_an_unknown_task_is_named(tiny_llama, tiny_tokenizer, task_dir, monkeypatch):
    import lm_eval.tasks

    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # its own take long to read
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    plan = plan_of(tiny_llama, HeadPlan())
    with pytest.raises(KVCompressError, match="no task notes_nothing in lm-evaluation-harness"):
        run_harness(tiny_llama, tiny_tokenizer, plan, None, ["notes_nothing"], task_dir=task_dir)
    with pytest.raises(KVCompressError, match="nowhere: no such folder"):
        run_harness(tiny_llama, tiny_tokenizer, plan, None, ["notes_choice"], task_dir="nowhere")


def test_without_lm_eval_the_extra_is_named(tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(KVCompressError, match=r"pip install 'kvcompress\[eval\]'"):
        run_harness(tiny_llama, tiny_tokenizer, plan_of(tiny_llama, HeadPlan()), None, ["x"])
    with pytest.raises(KVCompressError, match=r"pip install 'kvcompress\[eval\]'"):
        evaluate_harness("bundle", ["x"])
