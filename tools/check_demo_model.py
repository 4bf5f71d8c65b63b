"""The bar of the demo model: recall at the trained length, and perplexity beside a bigram model's.

    python tools/check_demo_model.py [MODEL_DIR]

Recall is exact match with transformers' own cache, question in the prompt. The bigram model counts
the training text, with add-δ smoothing, δ chosen on the held-out text itself, in its favour.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.demo.run import MODEL
from kvcompress.evaluate.quality import measure
from kvcompress.evaluate.suite import make_suite

sys.path.insert(0, str(Path(__file__).parent))
RECALL_BAR = 0.95


def bigram_perplexity(train: list[int], held: list[int], vocabulary: int) -> float:
    """The best over δ of an add-δ bigram model, backed by nothing else."""
    counts = np.zeros((vocabulary, vocabulary))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    first, second = np.array(held[:-1]), np.array(held[1:])
    best = math.inf
    for delta in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        probability = (counts[first, second] + delta) / (counts[first].sum(1) + delta * vocabulary)
        best = min(best, float(np.exp(-np.log(probability).mean())))
    return best


@torch.inference_mode()
def model_perplexity(model: torch.nn.Module, held: list[int], begin: int, length: int) -> float:
    """Over the whole held-out text, in windows of the trained length."""
    loss, tokens = 0.0, 0
    for low in range(0, len(held) - 1, length - 1):
        ids = torch.tensor([[begin, *held[low : low + length - 1]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--samples", type=int, default=240)
    args = parser.parse_args()
    from train_demo_model import documentation

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held_text = (Path(args.model) / "held_out.txt").read_text(encoding="utf-8")
    suite = make_suite(
        tokenizer,
        tasks=("recall", "multi_key", "hops", "count"),
        samples=args.samples,
        windows=0,
        text=Path(args.model) / "held_out.txt",
        seed=1,
    )
    found = measure(model, tokenizer, suite).report.visible
    assert found is not None
    train = tokenizer(documentation()[0], add_special_tokens=False, verbose=False)["input_ids"]
    held = tokenizer(held_text, add_special_tokens=False, verbose=False)["input_ids"]
    result = {
        "context_tokens": suite.context_tokens,
        "recall": round(found.exact, 4),
        "recall_interval": [round(x, 4) for x in found.interval],
        "recall_by_words": {k: round(v, 4) for k, v in found.by_span.items()},
        "by_task": {k: round(v, 4) for k, v in found.by_task.items()},
        "multi_key_single_keys": round(found.multi_key or 0.0, 4),
        "perplexity": round(
            model_perplexity(model, held, tokenizer.bos_token_id, tokenizer.model_max_length), 2
        ),
        "bigram_perplexity": round(bigram_perplexity(train, held, len(tokenizer)), 2),
    }
    print(json.dumps(result, indent=1))
    if found.exact < RECALL_BAR or result["perplexity"] > 0.7 * result["bigram_perplexity"]:
        sys.exit(f"below the bar: recall {RECALL_BAR}, perplexity 0.7 of the bigram model's")


if __name__ == "__main__":
    main()
