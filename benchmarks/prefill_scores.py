"""What the scores of a prompt cost: one layer's attention, and a prefill, beside the plain ones.

    python benchmarks/prefill_scores.py                    # 1024, 4096 and 8192 tokens, bf16, CPU
    python benchmarks/prefill_scores.py --device cuda --contexts 8192 32768 --json

Ways to score: *float32 chunks* attends to everything a second way and is what scored prompts ran
before; *one pass* gives output and exact column sums together; *estimated* takes the model's own
kernel and its normalisers (score_rows 64, score_stride 32); *last rows* the kernel and 64 rows. A
layer is timed alone, on random queries, keys and values; a model is a Llama-like one with random
weights, whose prefill also evicts and encodes: *int8* stores every token and scores none. All ways
of a row take turns, round by round; ratios are of medians. Timings are worth something on a quiet
machine only: `cpu_share` says how much of the wall time the process had the processor.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F

from kvcompress.plan import Budget, HeadPlan, Plan, uniform
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach, detach
from kvcompress.runtime.layer import attention as layer_attention
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.prompt.attention_inputs import new_scores
from kvcompress.runtime.prompt.score_queries import attend_prompt
from kvcompress.runtime.store.attend import Chunk, attend
from kvcompress.runtime.store.state import LayerSettings, LayerState

PLAIN, OLD = "plain", "float32 chunks"
VOTERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "one pass": (None, None),
    "estimated": (64, 32),
    "last rows": (64, None),
}
EIGHTH: Final = HeadPlan(frequent=Budget(ratio=0.0625), local=Budget(ratio=0.0625))
Run = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.manual_seed(0)
    levels = {"layer": layer_runs, "model": model_runs}
    rows = []
    for context in args.contexts:
        for level in levels if args.only is None else (args.only,):
            found = timed(levels[level](args, context), args.rounds, args)
            rows.append({"level": level, "context_tokens": context, **found})
    result = {"conditions": conditions(args), "rows": rows}
    print(json.dumps(result, indent=1) if args.json else table(result))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each way; the first is warm-up"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--query-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4, help="of the whole model")
    parser.add_argument("--only", choices=("layer", "model"), help="leave the other out")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    return parser.parse_args(argv)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = args.device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch": 1,
        "query_heads": args.query_heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "model_layers": args.layers,
        "rounds": args.rounds,
        "torch": torch.__version__,
    }


# ---- what is timed
def model_of(args: argparse.Namespace, context: int) -> Any:
    """Llama-like: hidden size of all query heads, feed-forward parts 2.75 times as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = args.query_heads * args.head_dim
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.query_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def plan_of(
    model: Any, score_queries: tuple[int | None, int | None], head: HeadPlan = EIGHTH
) -> Plan:
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, head, score_rows=score_queries[0], score_stride=score_queries[1])


def layer_runs(args: argparse.Namespace, context: int) -> dict[str, Run]:
    """Attention of one layer, with the scores that each way leaves."""
    model = model_of(argparse.Namespace(**{**vars(args), "layers": 1}), context)
    g = torch.Generator().manual_seed(1)

    def made(heads: int) -> torch.Tensor:  # heads behind tokens in memory, as modules make them
        own = torch.randn(1, context, heads, args.head_dim, generator=g)
        return own.to(args.device, model.dtype).transpose(1, 2)

    q, k, v = made(args.query_heads), made(args.kv_heads), made(args.kv_heads)
    chunk = Chunk(q, k, v, 0, None, None, None, args.head_dim**-0.5, None)

    def plain() -> torch.Tensor:
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).contiguous()

    def empty(
        score_queries: tuple[int | None, int | None],
    ) -> tuple[LayerState, dict[int, torch.Tensor]]:
        settings = LayerSettings(plan_of(model, score_queries), None, 0)
        state = LayerState.empty(settings, k, v, [()])
        if score_queries[0] is not None and score_queries[1] is None:
            state.first_vote = max(0, context - score_queries[0])
        return state, new_scores(state, chunk)

    def old() -> torch.Tensor:
        state, scores = empty((None, None))
        return attend(state, chunk, scores).transpose(1, 2).contiguous()

    def way(score_queries: tuple[int | None, int | None]) -> Run:
        def run() -> torch.Tensor:
            state, scores = empty(score_queries)
            return attend_prompt(state, chunk, scores, plain, None)

        return run

    return {
        PLAIN: plain,
        OLD: old,
        **{name: way(score_queries) for name, score_queries in VOTERS.items()},
    }


def model_runs(args: argparse.Namespace, context: int) -> dict[str, Run]:
    """A whole prefill: with transformers' own cache, and with the compressed one."""
    from transformers import DynamicCache

    model = model_of(args, context)
    ids = torch.randint(3, 1000, (1, context), generator=torch.Generator().manual_seed(2))
    ids = ids.to(args.device)

    def prefill(cache: Any) -> None:
        model(ids, **as_argument(cache), use_cache=True, logits_to_keep=1)

    def compressed(plan: Plan, old: bool = False) -> Run:
        def run() -> None:
            attach(model, plan)
            try:
                with float32_chunks(old):
                    prefill(new_cache(model))
            finally:
                detach(model)

        return run

    exact = plan_of(model, (None, None))
    return {
        PLAIN: lambda: prefill(DynamicCache(config=model.config)),
        "int8": compressed(plan_of(model, (None, None), HeadPlan(full=True))),
        OLD: compressed(exact, old=True),
        **{
            name: compressed(plan_of(model, score_queries))
            for name, score_queries in VOTERS.items()
        },
    }


@contextmanager
def float32_chunks(wanted: bool) -> Iterator[None]:
    """Within the block prompts run through the float32 attention that later prompts take."""

    def old(state: LayerState, chunk: Chunk, scores: Any, *rest: Any) -> torch.Tensor:
        return attend(state, chunk, scores).transpose(1, 2).contiguous()

    before = layer_attention.attend_prompt
    if wanted:
        layer_attention.attend_prompt = old
    try:
        yield
    finally:
        layer_attention.attend_prompt = before


# ---- timing
@torch.inference_mode()
def timed(runs: dict[str, Run], rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each way, and its ratio to the plain one."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    wall = cpu = 0.0
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin, began = time.perf_counter(), time.process_time()
            run()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            wall, cpu = wall + seconds, cpu + time.process_time() - began
            if number:
                taken[name].append(1000 * seconds)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "ms": {name: round(median, 2) for name, median in medians.items()},
        "ratio": {name: round(median / medians[PLAIN], 3) for name, median in medians.items()},
        "all_ms": {name: [round(x, 2) for x in each] for name, each in taken.items()},
        "cpu_share": round(cpu / wall, 2),
    }


def table(result: dict[str, Any]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in result["conditions"].items())
    names = [OLD, *VOTERS, "int8"]
    lines = [told, "", "| | tokens | plain, ms | " + " | ".join(names) + " | CPU share |"]
    lines.append("|---|" + "---:|" * (len(names) + 3))
    for row in result["rows"]:
        ratios = [f"{row['ratio'][n]:.2f}" if n in row["ratio"] else "" for n in names]
        cells = [row["level"], str(row["context_tokens"]), f"{row['ms'][PLAIN]:.1f}", *ratios]
        lines.append(f"| {' | '.join(cells)} | {row['cpu_share']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
