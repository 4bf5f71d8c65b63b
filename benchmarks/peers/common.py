"""What both runners share; imports torch and transformers only, to run in either environment."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from models import FAMILIES, LAYERS, ROOT, bounds_of, build, demo_ids, demo_model, feed, token_ids
from reference import (
    WINDOW,
    Kept,
    agreement,
    best_by_votes,
    full_layers,
    gap,
    reference,
    share,
)
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(ROOT))
from kvcompress.measure.caches import storage_bytes

__all__ = [
    "FAMILIES",
    "FULL",
    "LAYERS",
    "SMALL",
    "WINDOW",
    "Kept",
    "Record",
    "Setting",
    "agreement",
    "best_by_votes",
    "both_models",
    "bounds_of",
    "build",
    "demo_ids",
    "demo_model",
    "feed",
    "full_layers",
    "gap",
    "generated",
    "generation",
    "main",
    "measured",
    "position_of_step",
    "reference",
    "share",
    "standard",
    "storage_bytes",
    "token_ids",
]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # no download, no GPU
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"


@dataclass(frozen=True)
class Setting:
    """Sizes in tokens; `SMALL` is for the test of this comparison."""

    context: int = 1024
    short_row: int = 300
    question: int = 16
    turn: int = 64
    steps: int = 8
    long: int = 256

    @property
    def kept(self) -> int:
        return self.context // 2


FULL = Setting()
SMALL = Setting(context=144, short_row=90, question=8, turn=40, steps=2, long=16)


def position_of_step(model: Any, cache: Any, ids: Tensor, bounds: list[int], given: bool) -> int:
    """Position that the rotary embedding gets for the first token after the prompt."""
    seen: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(int((*args, *kwargs.values())[1].max()))

    hook = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    feed(model, cache, ids, bounds[1:3], positions=given)
    hook.remove()
    return seen[0]


def generated(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits ``[B, vocab]`` of the second token of `generate`, the first compressed step."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[1]


def generation(model: Any, ids: Tensor, steps: int) -> Any:
    """A greedy `generate` of so many tokens behind the first, with its logits."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def standard(setting: Setting) -> tuple[Any, Tensor, list[int]]:
    """Llama, one row, and single-token steps after the prompt."""
    ids = token_ids(setting.context + setting.steps)
    return build(), ids, bounds_of(setting.context, *[1] * setting.steps)


def both_models(
    setting: Setting, more: int, trained_length: int
) -> dict[str, tuple[Any, Tensor, int]]:
    """(model, ids, tokens of the prompt): one of random weights, and the trained one on text."""
    trained, tokenizer = demo_model()
    text = demo_ids(tokenizer, trained_length)
    return {
        "random weights": (build(), token_ids(setting.context + more), setting.context),
        "trained": (trained, text, min(512, setting.context)),
    }


Record = dict[str, Any]


def measured(function: Callable[..., Record], *args: Any, **kwargs: Any) -> Record:
    """What `function` measured, or the error that it ended with."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # a crash of a library under test is a result
        text = " ".join(str(error).split()).replace(f"{ROOT}/", "")
        return {"error": f"{type(error).__name__}: {text}"[:300]}


def fingerprint() -> list[float]:
    """A few logits of every model: equal where two environments run the same ones."""
    values = []
    for family in FAMILIES:
        logits = feed(build(family), DynamicCache(), token_ids(64), [0, 64])[0]
        values += [round(float(x), 4) for x in (logits[0, -1, 7], logits.std())]
    return values


def conditions(library: str, version: str, setting: Setting) -> Record:
    return {
        library: version,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "layers": LAYERS,
        "head_dim": 32,
        "context_tokens": setting.context,
        "short_row_tokens": setting.short_row,
        "question_tokens": setting.question,
        "turn_tokens": setting.turn,
        "steps": setting.steps,
        "fingerprint": fingerprint(),
    }


def save(path: Path, part: str, value: Record, key: str | None = None) -> None:
    """Replace one part of the results, or one entry of it, and leave the others alone."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key is None:
        data[part] = value
    else:
        data.setdefault(part, {})[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(situations: Callable[[str], tuple[str, dict[str, Callable[[Setting], Record]]]]) -> None:
    """Command line: measure one side, and put the results beside those of the other.

    Args:
        situations: of a side's name its version and its situations.
    """
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        command = [sys.executable, *sys.argv]  # libraries read these when they are imported
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    parser = argparse.ArgumentParser(description="the situations on one side")
    parser.add_argument("library", choices=("kvpress", "kvcompress"))
    parser.add_argument("--only", action="append", help="just this situation; repeatable")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    library = args.library
    version, found_here = situations(library)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    chosen = args.only or [*found_here]
    for name in chosen:
        start = time.perf_counter()
        found = found_here[name](FULL)
        print(f"{library} {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        if name == "versions":
            save(args.output, f"{library}_versions", found, transformers.__version__)
        else:
            save(args.output, library, found, name)
    if chosen != ["versions"]:
        save(args.output, library, conditions(library, version, FULL), "conditions")
