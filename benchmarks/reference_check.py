"""The package's figures of one plan beside those that plain transformers come to.

The compressed run's logits and the tokens behind them are written to a folder, and
`tools/reference_kl.py`, which shares no code with the package, reads them in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvcompress.evaluate.answers import Grader
from kvcompress.evaluate.drawing import WorkloadSuite
from kvcompress.evaluate.runner import Runner
from kvcompress.evaluate.serving import serving
from kvcompress.evaluate.session import fed_tokens
from kvcompress.evaluate.workloads_report import WorkloadOutcome
from kvcompress.evaluate.workloads_run import turns_of

ROOT: Final = Path(__file__).parents[1]
SAMPLES: Final = 12  # questions that are looked at again
BATCH_ROWS: Final = 16
Record = dict[str, Any]


def check(
    model_dir: str,
    model: Any,
    tokenizer: Any,
    suite: WorkloadSuite,
    plan: Any,
    params: Any,
    outcome: WorkloadOutcome,
    folder: Path,
) -> Record:
    """Both sides' figures of the first questions of `suite`, or of its windows.

    Args:
        outcome: what the package measured of the same plan.
        folder: for the tokens and logits.
    """
    runner_rows = max(BATCH_ROWS, len(suite.samples))
    with serving(model, plan, params) as new_cache:
        runner = Runner(model, Grader(tokenizer), new_cache, runner_rows, suite.chunk_tokens)
        items, logits = (_asked if suite.samples else _windows)(runner, suite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.json").write_text(json.dumps(items), encoding="utf-8")
    save_file({"logits": logits.float().contiguous()}, folder / "logits.safetensors")
    command = [sys.executable, str(ROOT / "tools" / "reference_kl.py"), model_dir, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain: Record = json.loads(done.stdout.splitlines()[-1])
    count = len(items)
    ours = {"nats": fmean(outcome.answer_nats[:count])}
    if suite.samples:
        ours["right"] = fmean(float(hit == 1) for hit in outcome.hits[:count])
    else:
        ours |= {"kl_nats": fmean(outcome.kl_nats), "flips": fmean(outcome.flips)}
    return {"plain": plain, "package": ours}


def _asked(runner: Runner, suite: WorkloadSuite) -> tuple[list[Record], Tensor]:
    asked = [(sample.document, turns_of(sample, runner.grader)) for sample in suite.samples]
    logits = runner.feed_answers(suite.documents, asked)[:SAMPLES]
    items = []
    for document, turns in asked[:SAMPLES]:
        fed, scored = fed_tokens(turns)
        prompt = list(suite.documents[document].prompt)
        items.append({"prompt": prompt, "fed": fed, "scored": scored})
    return items, torch.cat(logits)


def _windows(runner: Runner, suite: WorkloadSuite) -> tuple[list[Record], Tensor]:
    assert suite.windows is not None
    logits = runner.text_logits(suite.windows, suite.context_tokens, suite.feed_tokens)
    assert logits is not None
    items = []
    for row in suite.windows.tolist():
        fed = row[suite.context_tokens :]
        prompt = row[: suite.context_tokens]
        items.append({"prompt": prompt, "fed": fed, "scored": list(range(len(fed)))})
    return items, logits.flatten(0, 1)
