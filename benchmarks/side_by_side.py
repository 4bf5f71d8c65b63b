"""What the side-by-side benchmarks share: one suite, one measurement per plan, paired differences.

Every measurement is a JSON cell that is written as soon as it is done, so a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import kvcompress
from kvcompress.accounting import kv_bytes
from kvcompress.evaluate.quality import Outcome, measure
from kvcompress.evaluate.report import Answered, bootstrap
from kvcompress.evaluate.session import Session
from kvcompress.evaluate.suite import Suite, make_suite
from kvcompress.plan import Plan
from kvcompress.profile.source import load_source
from kvcompress.runtime.names import as_argument

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "kvcompress" / "demo" / "model"
FIGURES = ROOT / "docs" / "figures"
CONTEXT, NOTES, WORDS, WINDOWS, CONTINUATION = 640, 12, 4, 8, 64


def setting(samples: int) -> tuple[Any, Any, Suite]:
    """(model, tokenizer, suite): questions on notes in held-out text, and windows of that text."""
    model, tokenizer = load_source(str(MODEL), "cpu")
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


def conditions(samples: int) -> dict[str, Any]:
    return {
        "model": "kvcompress/demo/model",
        "dtype": "bfloat16",
        "context_tokens": CONTEXT,
        "questions": samples,
        "words_to_recall": f"1 to {WORDS}",
        "text_windows": f"{WINDOWS} of {CONTINUATION} tokens behind {CONTEXT}",
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


class Cells:
    """Finished measurements of one benchmark, by name, in its JSON file."""

    def __init__(self, path: Path, stated: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"conditions": stated, "cells": {}}
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["conditions"] == stated:
                self.content = before

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell `name`, measured now if it is not there."""
        cells = self.content["cells"]
        if name not in cells:
            started = time.perf_counter()
            cells[name] = make()
            self.save()
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return cells[name]

    def save(self) -> None:
        """Indented, but lists of numbers on one line each."""
        text = json.dumps(self.content, indent=1)
        for opening in ("[",):
            parts = text.split(opening)
            for i in range(1, len(parts)):
                inside, closed, rest = parts[i].partition("]")
                if closed and "{" not in inside:
                    parts[i] = " ".join(inside.split()) + closed + rest
            text = opening.join(parts)
        self.path.write_text(text + "\n", encoding="utf-8")


def full_cache(model: Any, tokenizer: Any, suite: Suite) -> Outcome:
    return measure(model, tokenizer, suite)


def quality(
    model: Any, tokenizer: Any, suite: Suite, plan: Plan | None, params: Any, full: Outcome
) -> dict[str, Any]:
    """Recall with the question hidden and visible, KL on text, bytes: one cell."""
    outcome = full if plan is None else measure(model, tokenizer, suite, plan, params)
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
        "kl_nats": kl_by_window(full, outcome),
    }


def _hits(answered: Sequence[Answered]) -> str:
    """One digit per question."""
    return "".join(str(int(a.exact)) for a in answered)


def kl_by_window(full: Outcome, other: Outcome) -> list[float]:
    """Mean KL(full cache ‖ other) per token of each text window, in nats."""
    assert full.logits is not None and other.logits is not None
    p, q = (o.logits.double().log_softmax(-1) for o in (full, other))  # type: ignore[union-attr]
    found = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(-1)
    return [round(float(x), 6) for x in found]


def answer_nats(
    model: Any, tokenizer: Any, suite: Suite, plan: Plan | None, params: Any
) -> list[float]:
    """Per question, −log p of a token of the true answer, question and answer fed after the
    document is in the cache: says more than a hit where hits are rare."""
    kvcompress.detach(model)
    if plan is not None:
        kvcompress.attach(model, plan, params)
    found = [0.0] * len(suite.samples)
    pad = tokenizer.pad_token_id or 0
    for document in sorted({sample.document for sample in suite.samples}):
        own = [i for i, sample in enumerate(suite.samples) if sample.document == document]
        session = Session(model, _new_cache(model, plan), pad)
        context = tokenizer(suite.samples[own[0]].context, verbose=False)["input_ids"]
        session.prefill([context])
        session.select([0] * len(own))
        texts = [(suite.samples[i].question, suite.samples[i].answer) for i in own]
        encode = {t: tokenizer(t, add_special_tokens=False)["input_ids"] for p in texts for t in p}
        fed = [encode[question] + encode[answer] for question, answer in texts]
        longest = max(map(len, fed))
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in fed])
        scores = session.feed(tokens).float().log_softmax(-1)
        for row, (i, (question, _)) in enumerate(zip(own, texts, strict=True)):
            places = range(len(encode[question]), len(fed[row]))
            nats = [-float(scores[row, p - 1, tokens[row, p]]) for p in places]
            found[i] = round(sum(nats) / len(nats), 4)
    kvcompress.detach(model)
    return found


def _new_cache(model: Any, plan: Plan | None) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config) if plan is None else kvcompress.new_cache(model)


def values(cell: dict[str, Any], name: str) -> list[float]:
    """Per question or window."""
    held = cell[name]
    return [float(x) for x in held]


def summary(cell: dict[str, Any], name: str) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval."""
    return bootstrap(values(cell, name))


def difference(
    ours: dict[str, Any], theirs: dict[str, Any], name: str
) -> tuple[float, tuple[float, float]]:
    """Mean of ours − theirs and its 95 % interval, paired by question or window."""
    pairs = zip(values(ours, name), values(theirs, name), strict=True)
    return bootstrap([a - b for a, b in pairs])


def percent(cell: dict[str, Any], name: str) -> str:
    """``42 % [32, 52]``: share of questions answered, 95 % interval."""
    mean, (low, high) = summary(cell, name)
    return f"{100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def gap(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, unit: float = 1.0, digits: int = 2
) -> str:
    """``+3 [-1, +7]``: `difference`; empty for a cell and itself.

    Args:
        unit: 100 shows points of a share, without decimals.
    """
    if ours is theirs:
        return ""
    mean, (low, high) = difference(ours, theirs, name)
    digits = 0 if unit == 100 else digits
    return f"{unit * mean:+.{digits}f} [{unit * low:+.{digits}f}, {unit * high:+.{digits}f}]"


@torch.inference_mode()
def held_positions(model: Any, plan: Plan, ids: torch.Tensor) -> list[list[list[set[int]]]]:
    """``[layer][row][KV head]`` coded positions after the prompts `ids` ``[B, S]``."""
    kvcompress.attach(model, plan)
    try:
        cache = kvcompress.new_cache(model)
        model(input_ids=ids, **as_argument(cache), use_cache=True, logits_to_keep=1)
    finally:
        kvcompress.detach(model)
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
