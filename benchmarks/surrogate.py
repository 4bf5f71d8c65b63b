"""KVzip, its linear surrogate and simpler scorers at equal bytes, and what each costs to prefill.

    python benchmarks/surrogate.py            # writes benchmarks/results/surrogate.json

On the shipped model: recall with the question hidden, 960 tokens of context, int8 codes, at 1/4,
1/8 and 1/16 of the bf16 bytes. `equal`: every head has the same budget; `pooled`: the best tokens
of all heads and layers. The surrogate is trained by the profiler on 16 built-in prompts of 1024
tokens.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from studies import RESULTS, attached, parser_of, shipped, taking_turns
from transformers import DynamicCache

from kvcompress.demo.plans import at_bytes
from kvcompress.evaluate.drawing import Sizes
from kvcompress.evaluate.workloads import make_workloads
from kvcompress.evaluate.workloads_run import run_workload
from kvcompress.measure import machine
from kvcompress.measure.cells import write_json
from kvcompress.measure.stats import interval
from kvcompress.plan import Budget, HeadPlan, ModelShape, Plan, PooledBudget, uniform
from kvcompress.profile.run import run
from kvcompress.profile.store import Profile
from kvcompress.recipe import Calibration, Keep, Recipe, UniformPolicy
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.names import as_argument

CONTEXT, RATIOS = 960, (0.25, 0.125, 0.0625)
POOLED = PooledBudget(kind="pooled", scope="model", floor=0.05)
SNAPKV: dict[str, Any] = {"scorer": "mean", "score_rows": 32, "pool_tokens": 7}
SYSTEMS: dict[str, dict[str, Any]] = {
    "random": {"scorer": "random"},
    "mean": {"scorer": "mean"},
    "lift": {"scorer": "lift"},
    "snapkv": SNAPKV,
    "kvzip": {"scorer": "kvzip"},
    "kvzip_plus": {"scorer": "kvzip_plus"},
    "surrogate": {"scorer": "surrogate"},
}


def plan_of(shape: ModelShape, settings: dict[str, Any], pooled: bool, ratio: float) -> Plan:
    """int8, sinks and recent tokens aside one `frequent` budget, at the given share of bf16."""
    rule = {"per_request": POOLED} if pooled else {}
    target = int(ratio * shape.bf16_kv_bytes(CONTEXT, 1))

    def make(tokens: int) -> Plan:
        head = HeadPlan(frequent=Budget(tokens=max(1, tokens)))
        return uniform(shape, head, **settings, **rule)

    return at_bytes(make, target, CONTEXT)


def recall(model, tokenizer, profile: Profile, params, questions: int) -> list[dict[str, Any]]:
    """One row for each system, way to share out budgets and ratio; first the full cache."""
    (suite,) = make_workloads(
        tokenizer,
        Sizes(CONTEXT, profile.shape.max_position, windows=0),
        names=("hidden",),
        samples=questions,
    )
    cells: list[tuple[str, bool, float | None]] = [("full", False, None)]
    cells += [(n, p, r) for r in RATIOS for p in (False, True) for n in SYSTEMS]
    rows = []
    for name, pooled, ratio in cells:
        plan = None if ratio is None else plan_of(profile.shape, SYSTEMS[name], pooled, ratio)
        found = run_workload(model, tokenizer, suite, plan, params, batch_rows=8)
        mean, bounds = interval(found.hits)
        rows.append(
            {
                "system": name,
                "budgets": None if ratio is None else ("pooled" if pooled else "equal"),
                "of_bf16": ratio,
                "kv_bytes": found.kv_bytes,
                "kv_bytes_bf16": found.kv_bytes_bf16,
                "recall": round(mean, 4),
                "interval": [round(x, 4) for x in bounds],
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


@torch.inference_mode()
def prefill_cost(model, profile: Profile, params, repeats: int) -> dict[str, Any]:
    """Median prefill in units of the plain model's, prompts of all systems taken in turn."""
    ids = torch.randint(3, 1500, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    plans = {n: plan_of(profile.shape, SYSTEMS[n], True, 0.25) for n in SYSTEMS} | {"plain": None}

    def read() -> None:
        model(input_ids=ids, **as_argument(DynamicCache()), logits_to_keep=1)

    def compressed() -> None:
        cache = new_cache(model)
        model(input_ids=ids, **as_argument(cache), logits_to_keep=1)
        cache.finish_prompt(model)

    runs = {"plain": read} | dict.fromkeys(SYSTEMS, compressed)
    found = taking_turns(runs, repeats, 1, lambda name: attached(model, plans[name], params))
    attached(model, None)
    seconds = {name: statistics.median(s.wall_ms()) / 1000 for name, s in found.items()}
    costs = {name: round(taken / seconds["plain"], 2) for name, taken in seconds.items()}
    return {"plain_seconds": round(seconds["plain"], 4), "times_plain": costs}


def trained(model, tokenizer, out: Path) -> Profile:
    recipe = Recipe(
        name="surrogate",
        calibration=Calibration(prompts=16, tokens=1024),
        keep=Keep(scorer="surrogate"),
        policy=UniformPolicy(kind="uniform", head=HeadPlan(frequent=Budget(ratio=0.25))),
    )
    return run(model, tokenizer, recipe, out)


def main() -> None:
    parser = parser_of(__doc__, RESULTS / "surrogate.json", 48)
    parser.add_argument("--profile", type=Path, help="a directory to train in, or trained before")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = shipped()
    with tempfile.TemporaryDirectory() as folder:
        out = options.profile or Path(folder) / "profile"
        began = time.perf_counter()
        profile = trained(model, tokenizer, out)
        taken = time.perf_counter() - began
        params = profile.load_params(out)
    cost = prefill_cost(model, profile, params, options.repeats)
    print(cost, flush=True)
    result = {
        "conditions": {
            "model": "kvcompress/demo/model, bf16",
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": machine.versions("torch", "transformers", "kvcompress"),
            "context_tokens": CONTEXT,
            "questions": options.samples,
            "storage": "int8, 4 sinks and 16 recent tokens in bf16",
            "seed": 0,
        },
        "profile_seconds": round(taken, 1) if options.profile is None else None,
        "surrogate_r2": profile.surrogate_r2,
        "prefill": {**cost, "batch": 1, "repeats": options.repeats},
        "recall": recall(model, tokenizer, profile, params, options.samples),
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()
