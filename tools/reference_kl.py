"""Quality of a compressed cache, worked out without kvcompress: torch and transformers alone.

    python tools/reference_kl.py MODEL_DIR DUMP_DIR

DUMP_DIR has what a compressed run saw and said (`benchmarks/reference_check.py` writes it):
``items.json``, token ids of each prompt, of what was fed behind it, and the places among these
that are scored; and ``logits.safetensors``, one row of the compressed run for each scored place.
The full model reads prompt and fed tokens here in one float32 forward without any cache, so that
nothing of the package's batching, padding, positions, caches or arithmetic of scores is trusted.
Prints, as JSON, KL(full || compressed), flips, answers right and nats per token of both.

A mask with −inf for dropped tokens would need every scorer written a second time, and says nothing
of rounding; comparing with the full model takes any plan as it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Item = dict[str, list[int]]


@torch.inference_mode()
def full_scores(model: AutoModelForCausalLM, item: Item) -> Tensor:
    """Log-probabilities ``[N, vocabulary]`` where the item's N scored tokens are due."""
    ids = torch.tensor([item["prompt"] + item["fed"]])
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    before = [len(item["prompt"]) + place - 1 for place in item["scored"]]
    return logits[before].log_softmax(-1)


def compared(full: Tensor, ours: Tensor, true: Tensor) -> dict[str, float]:
    """Means over the scored tokens of one item."""
    ours = ours.double().log_softmax(-1)
    rows = range(len(true))
    return {
        "kl_nats": float((full.exp() * (full - ours)).sum(-1).mean()),
        "flips": float((full.argmax(-1) != ours.argmax(-1)).double().mean()),
        "full_nats": -float(full[rows, true].mean()),
        "nats": -float(ours[rows, true].mean()),
        "full_right": float((full.argmax(-1) == true).all()),
        "right": float((ours.argmax(-1) == true).all()),
    }


def main(model_dir: str, dump: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    items = json.loads((Path(dump) / "items.json").read_text(encoding="utf-8"))
    logits = load_file(Path(dump) / "logits.safetensors")["logits"]
    assert len(logits) == sum(len(item["scored"]) for item in items), "one row for each place"
    found, start = [], 0
    for item in items:
        true = torch.tensor([item["fed"][place] for place in item["scored"]])
        ours = logits[start : start + len(true)]
        found.append(compared(full_scores(model, item), ours, true))
        start += len(true)
    means = {name: fmean(each[name] for each in found) for name in found[0]}
    print(json.dumps({"items": len(found), "tokens": start, **means}))


if __name__ == "__main__":
    main(*sys.argv[1:])
