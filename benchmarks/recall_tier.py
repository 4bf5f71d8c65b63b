"""The recall tier beside the full cache and beside methods that drop tokens, at equal bytes.

    python benchmarks/recall_tier.py            # writes benchmarks/results/recall_tier.json

On the shipped model, all in one process:
  recall  the second turn of a conversation (workload D2): notes, one question and its answer are
          compressed, then another note is asked for. Every row but the full caches and the curve
          over recalled blocks has an eighth of the bf16 bytes at the most; for the tier that is
          its resident part and the blocks that one layer brings back for a step.
  step    milliseconds of one decoded token, batch 1, with what a step reads and copies; the
          rows of a context are timed in turn, the median is shown.
"""

from __future__ import annotations

import statistics
import warnings
from functools import partial
from typing import Any

import torch
from studies import RESULTS, attached, fitting, parser_of, shipped, stated, taking_turns

import kvcompress
from kvcompress.accounting import (
    host_bytes,
    recall_blocks,
    recall_within,
    recalled_bytes,
    vector_bytes,
)
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.workloads import make_workloads
from kvcompress.evaluate.workloads_run import run_workload
from kvcompress.measure.cells import write_json
from kvcompress.measure.stats import interval, paired
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, Recall, uniform
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument

CONTEXT, SHARE = 960, 8
WARM = 4  # steps that are not recorded
CURVE = (2, 4, 8, 12, 16, 24)
INT8 = HeadPlan(full=True, k_dtype="int8", v_dtype="int8")


def largest(shape: ModelShape, target: int, context: int, part: str) -> Plan:
    """The largest budget within `target` bytes: newest tokens, or half of them by raw attention
    sums as H2O ranks them."""

    def plan(tokens: int) -> Plan:
        if part == "sink+recent":
            return uniform(shape, HeadPlan(local=Budget(tokens=tokens)))
        half = Budget(tokens=tokens // 2)
        return uniform(shape, HeadPlan(local=half, frequent=half), scorer="raw")

    return fitting(plan, target, context, step=2)


def tier(shape: ModelShape, **settings: Any) -> Plan:
    recall = Recall(**{"resident": Budget(tokens=84), **settings})
    return uniform(shape, INT8, recall=recall)


def measure_recall(model, tokenizer, samples: int) -> list[dict]:
    shape = shape_of(model.config, model.dtype)
    target = shape.bf16_kv_bytes(CONTEXT, 1) // SHARE
    (suite,) = make_workloads(
        tokenizer,
        Sizes(CONTEXT, shape.max_position),
        names=["second_turn"],
        samples=samples,
    )
    int4 = INT8.model_copy(update={"k_dtype": "int4", "v_dtype": "int4"})
    rows = {
        "full cache": None,
        "int8, nothing dropped": uniform(shape, INT8),
        "recall tier": recall_within(tier(shape), target, CONTEXT, 1),
        "recall tier, blocks of 32": recall_within(
            tier(shape, block_tokens=32, recall_blocks=8), target, CONTEXT, 1
        ),
        "recall tier, mean digest": recall_within(tier(shape, digest="mean"), target, CONTEXT, 1),
        "recall tier, int4": recall_within(
            uniform(shape, int4, recall=Recall(resident=Budget(tokens=84), recall_blocks=24)),
            target,
            CONTEXT,
            1,
        ),
        "sink+recent, int8": largest(shape, target, CONTEXT, "sink+recent"),
        "H2O, int8": largest(shape, target, CONTEXT, "H2O"),
    }
    rows |= {f"84 resident tokens, {n} blocks": tier(shape, recall_blocks=n) for n in CURVE}
    full, result = None, []
    for name, plan in rows.items():
        found = run_workload(model, tokenizer, suite, plan)
        full = full or found
        score, (low, high) = interval(found.hits)
        less, (worst, best) = paired(found.hits, full.hits)
        tiered = plan is not None and plan.recall is not None
        result.append(
            {
                "name": name,
                "recall": score,
                "recall_95": [low, high],
                "difference_to_full": less,
                "difference_95": [worst, best],
                "resident_bytes": found.kv_bytes,
                "step_bytes": recalled_bytes(plan, CONTEXT, 1) if tiered else 0,
                "host_bytes": host_bytes(plan, [CONTEXT]) if tiered else 0,
                "bf16_bytes": found.kv_bytes_bf16,
                "plan_recall": plan.recall.model_dump() if tiered else None,
            }
        )
        show(result[-1])
    return result


def show(row: dict) -> None:
    device = (row["resident_bytes"] + row["step_bytes"]) / row["bf16_bytes"]
    print(
        f"{row['name']:30} recall {row['recall']:6.1%}  to full {row['difference_to_full']:+6.1%} "
        f"[{row['difference_95'][0]:+.1%}, {row['difference_95'][1]:+.1%}]  resident "
        f"{row['resident_bytes'] / row['bf16_bytes']:6.1%}, with a step {device:6.1%}, host "
        f"{row['host_bytes'] / row['bf16_bytes']:6.1%} of bf16",
        flush=True,
    )


@torch.inference_mode()
def measure_steps(model, context: int, steps: int) -> list[dict]:
    from transformers import DynamicCache

    shape = shape_of(model.config, model.dtype)
    shape = shape.model_copy(update={"max_position": 4 * context})
    target = shape.bf16_kv_bytes(context, 1) // SHARE
    plans = {
        "full cache (DynamicCache)": None,
        "int8, nothing dropped": uniform(shape, INT8),
        "sink+recent, int8": largest(shape, target, context, "sink+recent"),
        "recall tier": recall_within(tier(shape), target, context, 1),
    }
    ids = torch.arange(context)[None] % (model.config.vocab_size // 2) + 100
    caches: dict[str, Any] = {}
    for name, plan in plans.items():
        attached(model, plan)
        caches[name] = (
            DynamicCache(config=model.config) if plan is None else kvcompress.new_cache(model)
        )
        model(input_ids=ids, **as_argument(caches[name]), logits_to_keep=1)

    def decode(cache: Any) -> None:
        token = torch.tensor([[100 + cache.get_seq_length() - context]])
        model(input_ids=token, **as_argument(cache))

    runs = {name: partial(decode, cache) for name, cache in caches.items()}
    found = taking_turns(runs, steps - WARM, WARM, lambda name: attached(model, plans[name]))
    attached(model, None)
    rows = []
    for name, plan in plans.items():
        row = {
            "name": name,
            "context_tokens": context,
            "step_ms": statistics.median(found[name].wall_ms()),
            "digest_bytes_read": 0,
            "bytes_copied": 0,
        }
        if plan is not None and plan.recall is not None:
            exact = plan.sink_tokens + plan.recent_tokens
            blocks = recall_blocks(plan.recall, exact, [context], [context])
            one = 2 * vector_bytes("int8", shape.head_dim, shape.model_dtype_bytes)
            row["digest_bytes_read"] = shape.layers * shape.kv_heads * blocks.host[0] * one
            tiers = [layer.ready for layer in caches[name].layers]
            row["bytes_copied"] = sum(tier.copied_bytes() for tier in tiers) // steps
        rows.append(row)
        print(
            f"{name:30} context {context:5}  {row['step_ms']:6.1f} ms a step, digests read "
            f"{row['digest_bytes_read']:8}, copied {row['bytes_copied']:8} bytes",
            flush=True,
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__, RESULTS / "recall_tier.json", 192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--contexts", type=int, nargs="*", default=[CONTEXT, 8192])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model, tokenizer = shipped()
    result = {
        **stated(dtype=str(model.dtype).removeprefix("torch.")),
        "workload": "second_turn",
        "samples": arguments.samples,
        "context_tokens": CONTEXT,
        "recall": measure_recall(model, tokenizer, arguments.samples),
        "steps": [],
    }
    for context in arguments.contexts:
        write_json(arguments.json, result)  # what is measured is not lost
        result["steps"] += measure_steps(model, context, arguments.steps)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
