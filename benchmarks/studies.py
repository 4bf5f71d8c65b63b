"""What the studies on the shipped model share: conditions, suites, plans, cells and differences.

Every finished measurement is kept in a study's file, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import kvcompress
from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.quality import Outcome, measure
from kvcompress.evaluate.report import Answered
from kvcompress.evaluate.serving import serving
from kvcompress.evaluate.session import Session, answer_logits
from kvcompress.evaluate.suite import Suite, make_suite
from kvcompress.evaluate.text import text_losses
from kvcompress.measure import machine
from kvcompress.measure.stats import Estimate, interval, paired
from kvcompress.measure.timing import Samples, case_of, interleave
from kvcompress.plan import Plan
from kvcompress.profile.source import load_source
from kvcompress.runtime.names import as_argument

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
FIGURES: Final = ROOT / "docs" / "figures"
CONTEXT, NOTES, WORDS, WINDOWS, CONTINUATION = 640, 12, 4, 8, 64
Record = dict[str, Any]


# ---- model and conditions
def shipped() -> tuple[Any, Any]:
    """The shipped model and its tokenizer."""
    return load_source(str(ROOT / "kvcompress" / "demo" / "model"), "cpu")


def stated(**more: Any) -> Record:
    """Under what a study ran."""
    return {
        "model": "kvcompress/demo/model",
        **more,
        "versions": machine.versions("torch", "transformers"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def parser_of(about: str | None, result: Path, samples: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=samples, help="questions")
    parser.add_argument("--json", type=Path, default=result, help="file of the results")
    return parser


# ---- plans
def fitting(made: Callable[[int], Plan], target_bytes: int, context: int, step: int = 1) -> Plan:
    """The plan of the most tokens, in steps below `context`, within so many bytes."""
    tokens = range(context - context % step, 0, -step)
    return next(p for p in map(made, tokens) if kv_bytes(p, context, 1) <= target_bytes)


# ---- quality beside the full cache
def setting(samples: int) -> tuple[Any, Any, Suite]:
    """(model, tokenizer, suite): questions on notes in held-out text, and windows of that text."""
    model, tokenizer = shipped()
    suite = make_suite(
        tokenizer,
        tasks=("recall",),
        samples=samples,
        context_tokens=CONTEXT,
        notes_per_document=NOTES,
        max_words=WORDS,
        windows=WINDOWS,
        continuation_tokens=CONTINUATION,
    )
    return model, tokenizer, suite


def conditions(samples: int) -> Record:
    return stated(
        dtype="bfloat16",
        context_tokens=CONTEXT,
        questions=samples,
        words_to_recall=f"1 to {WORDS}",
        text_windows=f"{WINDOWS} of {CONTINUATION} tokens behind {CONTEXT}",
    )


def quality(
    model: Any, tokenizer: Any, suite: Suite, plan: Plan | None, params: Any, full: Outcome
) -> Record:
    """Recall with the question hidden and visible, KL on text, bytes: one cell."""
    outcome = full if plan is None else measure(model, tokenizer, suite, plan, params)
    assert outcome.logits is not None and suite.windows is not None
    losses = text_losses(outcome.logits, full.logits, suite.windows[:, suite.context_tokens :])
    report = outcome.report
    return {
        "kv_bytes": report.kv_bytes,
        "kv_bytes_accounted": report.kv_bytes if plan is None else kv_bytes(plan, CONTEXT, 1),
        "kv_ratio": round(report.kv_ratio, 5),
        "hidden": _hits(outcome.hidden),
        "visible": _hits(outcome.visible),
        "hidden_by_depth": report.hidden.by_depth if report.hidden else None,
        "visible_by_depth": report.visible.by_depth if report.visible else None,
        "answer_nats": answer_nats(model, tokenizer, suite, plan, params),
        "kl_nats": [round(float(x), 6) for x in losses.kl.mean(1)],
    }


def _hits(answered: Sequence[Answered]) -> str:
    """One digit per question."""
    return "".join(str(int(a.exact)) for a in answered)


def answer_nats(
    model: Any, tokenizer: Any, suite: Suite, plan: Plan | None, params: Any
) -> list[float]:
    """Per question, −log p of a token of the true answer, question and answer fed after the
    document is in the cache: says more than a hit where hits are rare."""
    found = [0.0] * len(suite.samples)
    with serving(model, plan, params) as new_cache:
        for document in sorted({sample.document for sample in suite.samples}):
            own = [i for i, sample in enumerate(suite.samples) if sample.document == document]
            session = Session(model, new_cache(), tokenizer.pad_token_id or 0)
            ids = tokenizer(suite.samples[own[0]].context, verbose=False)["input_ids"]
            asked = [(suite.samples[i].question, suite.samples[i].answer) for i in own]
            said = answer_log_probabilities(session, tokenizer, ids, asked)
            for i, (rows, answer) in zip(own, said, strict=True):
                nats = [-float(row[token]) for row, token in zip(rows, answer, strict=True)]
                found[i] = round(sum(nats) / len(nats), 4)
    return found


def answer_log_probabilities(
    session: Session, tokenizer: Any, ids: Sequence[int], asked: Sequence[tuple[str, str]]
) -> list[tuple[Tensor, list[int]]]:
    """Per (question, answer): log-probabilities ``[n, vocabulary]`` where the answer's n tokens are
    due, and these tokens; all fed at once, each behind a copy of the cache of `ids`."""
    encoded = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in asked
    ]
    logits = session.prefill([ids]).expand(len(asked), -1)
    session.select([0] * len(asked))
    found = answer_logits(session, logits, [[(question, answer)] for question, answer in encoded])
    return [
        (scores.float().log_softmax(-1), answer)
        for scores, (_, answer) in zip(found, encoded, strict=True)
    ]


# ---- time
def taking_turns(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    warm_rounds: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Samples]:
    """One run of each in every round.

    Args:
        before: not timed, told whose turn it is.
    """
    cases = [
        case_of(name, run, prepare=lambda name=name: before(name), warm=False)
        for name, run in runs.items()
    ]
    return dict(interleave(cases, rounds, 1, warm_rounds=warm_rounds))


# ---- figures in words
def values(cell: Record, name: str) -> list[float]:
    """Per question or window."""
    return [float(x) for x in cell[name]]


def summary(cell: Record, name: str) -> Estimate:
    """Mean and 95 % interval."""
    return interval(values(cell, name))


def difference(ours: Record, theirs: Record, name: str) -> Estimate:
    """Mean of ours − theirs and its 95 % interval, paired by question or window."""
    return paired(values(ours, name), values(theirs, name))


def percent(cell: Record, name: str) -> str:
    """``42 % [32, 52]``: share of questions answered, 95 % interval."""
    return shown(summary(cell, name), 100, 0, mark=" %")


def gap(ours: Record, theirs: Record, name: str, unit: float = 1.0, digits: int = 2) -> str:
    """``+3 [-1, +7]``: `difference`; empty for a cell and itself.

    Args:
        unit: 100 shows points of a share, without decimals.
    """
    if ours is theirs:
        return ""
    return shown(difference(ours, theirs, name), unit, 0 if unit == 100 else digits, sign="+")


def shown(found: Estimate, unit: float, digits: int, sign: str = "", mark: str = "") -> str:
    mean, low, high = (f"{unit * x:{sign}.{digits}f}" for x in (found[0], *found[1]))
    return f"{mean}{mark} [{low}, {high}]"


@torch.inference_mode()
def held_positions(model: Any, plan: Plan, ids: Tensor) -> list[list[list[set[int]]]]:
    """``[layer][row][KV head]`` coded positions after the prompts `ids` ``[B, S]``."""
    with serving(model, plan, None) as new_cache:
        cache: Any = new_cache()
        model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
    found = []
    for layer in cache.compressed_layers:
        heads: list[list[set[int]]] = [
            [set() for _ in layer.state.settings.heads] for _ in range(layer.state.batch)
        ]
        for group in layer.state.groups:
            store = group.store
            for row in range(layer.state.batch):
                for index, head in enumerate(group.heads):
                    start, size = store.starts[row][index], store.capacities[row][index]
                    held = store.position[start : start + size].tolist()
                    heads[row][head] = {p for p in held if p >= 0}
        found.append(heads)
    return found


def attached(model: Any, plan: Plan | None, params: Any = None) -> None:
    """Have the model serve `plan`; None for none."""
    kvcompress.detach(model)
    if plan is not None:
        kvcompress.attach(model, plan, params)
