"""How much the way of calling matters once tokens are evicted, in numbers.

    python benchmarks/under_eviction.py            # table; --json FILE keeps it

On the shipped model and text it was not trained on, for a plan that keeps a quarter of the tokens:
  chunked   the prompt in parts, compressed after every part, against the prompt at once
  held      the prompt in parts with compress="after_prefill": nothing may change
  drafts    prompt lookup against plain greedy decoding: no token may change
The figure is KL(at once ‖ in parts) of the next tokens, beside KL(full cache ‖ at once), which is
what eviction itself costs.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from studies import shipped

import kvcompress
from kvcompress.evaluate.text import text_losses
from kvcompress.measure import machine
from kvcompress.measure.cells import write_json
from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.profile.calibration import load_prompts
from kvcompress.recipe import Calibration
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument

PROMPT, NEXT, SIZES = 896, 64, (32, 128, 448)


def plans(model) -> dict[str, Plan]:
    """A quarter of the prompt, chosen in two ways."""
    shape = shape_of(model.config, model.dtype)
    quarter = PROMPT // 4
    return {
        "heavy hitters": uniform(
            shape, HeadPlan(frequent=Budget(tokens=quarter // 2), local=Budget(tokens=quarter // 2))
        ),
        "newest": uniform(shape, HeadPlan(local=Budget(tokens=quarter))),
    }


@torch.inference_mode()
def next_logits(model, cache, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of the NEXT tokens after the prompt, fed one by one, ``[NEXT, vocabulary]``."""
    for part in ids[:, :PROMPT].split(size, 1):
        out = model(input_ids=part, **as_argument(cache), use_cache=True)
    if isinstance(cache, kvcompress.CompressedCache):
        cache.end_prefill()
    rows = [out.logits[0, -1:]]
    for token in ids[0, PROMPT : PROMPT + NEXT - 1]:
        out = model(input_ids=token[None, None], **as_argument(cache), use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows).double()


def kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(wanted ‖ found) in nats."""
    target = torch.zeros(1, len(wanted), dtype=torch.long)  # the true tokens do not matter
    return float(text_losses(found[None], wanted[None], target).kl.mean())


def drafts(model, tokenizer, ids: torch.Tensor) -> int:
    """Tokens of 64 that prompt lookup changes."""
    options = {"max_new_tokens": NEXT, "do_sample": False, "eos_token_id": None,
               "pad_token_id": tokenizer.pad_token_id or 0}  # fmt: skip
    prompt = ids[:, :PROMPT]
    plain = model.generate(prompt, **options)
    drafted = model.generate(prompt, prompt_lookup_num_tokens=5, **options)
    return int((plain != drafted).sum())


def measure(prompts: int) -> dict:
    from transformers import DynamicCache

    model, tokenizer = shipped()
    model = model.float()
    texts = load_prompts(Calibration(prompts=prompts, tokens=PROMPT + NEXT, seed=7), tokenizer)
    ids = [torch.tensor([text]) for text in texts]
    rows = []
    for name, plan in plans(model).items():
        kvcompress.detach(model)
        full = [next_logits(model, DynamicCache(config=model.config), i, PROMPT) for i in ids]
        kvcompress.attach(model, plan)
        once = [next_logits(model, kvcompress.new_cache(model), i, PROMPT) for i in ids]

        def against(found, wanted) -> float:
            return sum(kl(w, f) for w, f in zip(wanted, found, strict=True)) / len(ids)

        row = {"plan": name, "eviction itself (KL to the full cache)": against(once, full)}
        for size in SIZES:
            parts = [next_logits(model, kvcompress.new_cache(model), i, size) for i in ids]
            row[f"parts of {size} (KL to at once)"] = against(parts, once)
            row[f"parts of {size} (KL to the full cache)"] = against(parts, full)
            held = [
                next_logits(model, kvcompress.new_cache(model, compress="after_prefill"), i, size)
                for i in ids[:2]
            ]
            row[f"parts of {size}, held (largest logit difference)"] = max(
                float((h - o).abs().max()) for h, o in zip(held, once, strict=False)
            )
        row[f"tokens of {NEXT * len(ids)} that drafting changes"] = sum(
            drafts(model, tokenizer, i) for i in ids
        )
        rows.append(row)
    return {
        "model": "kvcompress/demo/model",
        "dtype": "float32",
        "prompts": prompts,
        "prompt_tokens": PROMPT,
        "next_tokens": NEXT,
        "versions": machine.versions("torch", "transformers"),
        "machine": platform.machine(),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.prompts)
    for row in result["rows"]:
        print(row["plan"])
        for key, value in row.items():
            if key != "plan":
                print(f"  {key:55} {value:.3g}")
    if arguments.json is not None:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
