"""Peak resident memory of one generation, compressed cache beside transformers' DynamicCache.

    python benchmarks/peak_memory.py                      # 8192 tokens of context, bf16, CPU
    python benchmarks/peak_memory.py --context 4096 --json

Each variant runs in a process of its own, on the same Llama-like model with random weights: the
figures say how memory moves and nothing about quality. *Growth* is the peak over what the process
held with the model loaded and warmed up. A prompt should need one layer's full keys and values and
the compressed rest; beside them lie the activations of a forward, which are measured by one that
keeps nothing (*no cache*; it holds one layer's keys and values as well). *Other* is what growth has
beyond both: the room in which scores are computed and tokens are ranked and encoded.

glibc keeps freed blocks of up to 32 MiB, and what it happens to keep can outweigh a cache of this
size. All variants therefore run with MALLOC_MMAP_THRESHOLD_=131072, which hands freed tensors back;
`--system-malloc` measures without it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.measure.tables import markdown
from kvcompress.runtime.names import cache_of

if TYPE_CHECKING:
    from kvcompress.plan import Plan

MIB = 2**20
NO_CACHE, DYNAMIC = "no cache", "DynamicCache"
_EIGHTH = {"frequent": {"ratio": 0.0625}, "local": {"ratio": 0.0625}}
# (head, score_rows, score_stride): who votes on what stays, see docs/recipes.md
VARIANTS: dict[str, tuple[dict[str, Any], int | None, int | None] | None] = {
    NO_CACHE: None,
    DYNAMIC: None,
    "int8": ({"full": True}, None, None),
    "int4": ({"full": True, "k_dtype": "int4", "v_dtype": "int4"}, None, None),
    "1/8 int8, all rows vote": (_EIGHTH, None, None),
    "1/8 int8, last 128 rows": (_EIGHTH, 128, None),
    "1/8 int8, sums estimated": (_EIGHTH, 64, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--kv-heads", type=int, default=4, help="of 64 channels; as many query heads"
    )
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    parser.add_argument("--system-malloc", action="store_true", help="leave the allocator alone")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args)))
        return
    results = []
    for variant in VARIANTS:
        print(f"{variant} ...", file=sys.stderr)
        results.append(in_fresh_process(variant, args.system_malloc))
    print(json.dumps(results, indent=1) if args.json else table(results, args))


def in_fresh_process(variant: str, system_malloc: bool) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--variant", variant]
    own = {} if system_malloc else {"MALLOC_MMAP_THRESHOLD_": "131072"}
    environment = {**os.environ, **own}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One generation; what it held and how far memory rose."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcompress.accounting import prefill_bytes
    from kvcompress.evaluate.serving import cache_bytes
    from kvcompress.runtime.hf.attach import attach
    from kvcompress.runtime.model.families import shape_of

    torch.manual_seed(0)
    heads = args.kv_heads
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=heads * 64,
        intermediate_size=heads * 128,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=args.context + args.new_tokens,
    )
    model: Any = LlamaForCausalLM(config).to(dtype=torch.bfloat16).eval()
    plan = plan_of(args.variant, config)
    if plan is not None:
        attach(model, plan)
    ids = torch.randint(3, config.vocab_size, (1, args.context))

    def generate(prompt: torch.Tensor) -> Any:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )

    def once(prompt: torch.Tensor) -> Any:
        if args.variant != NO_CACHE:
            return cache_of(generate(prompt))
        with torch.no_grad():
            model(prompt, use_cache=False, logits_to_keep=1)
        return None

    once(ids[:, :64])  # libraries allocate their own buffers once
    settle()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    cache = once(ids)
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    return {
        "variant": args.variant,
        "context_tokens": args.context,
        "new_tokens": args.new_tokens,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "kv_bytes": 0 if cache is None else cache_bytes(cache),
        "layer_bytes": prefill_bytes(shape_of(config, torch.bfloat16), args.context, 1),
        "baseline_bytes": before,
        "peak_bytes": peak,
        "growth_bytes": peak - before,
        "seconds": round(seconds, 2),
    }


def plan_of(variant: str, config: Any) -> Plan | None:
    import torch

    from kvcompress.plan import HeadPlan, uniform
    from kvcompress.runtime.model.families import shape_of

    told = VARIANTS[variant]
    if told is None:
        return None
    head, rows, stride = told
    shape = shape_of(config, torch.bfloat16)
    return uniform(shape, HeadPlan.model_validate(head), score_rows=rows, score_stride=stride)


def settle() -> None:
    """Give freed memory back and start the peak anew, as far as the system allows."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def resident_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process; the highest ever where the system has no /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def other_bytes(row: dict[str, Any], no_cache: dict[str, Any]) -> int:
    """Growth beyond a forward that keeps nothing and the cache that is kept."""
    return int(row["growth_bytes"] - no_cache["growth_bytes"] - row["kv_bytes"])


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    named = {row["variant"]: row for row in results}
    no_cache, dynamic = named[NO_CACHE], named[DYNAMIC]
    layer = dynamic["layer_bytes"]
    lines = [
        f"batch 1, {args.context} tokens of context, {args.new_tokens} generated, bf16, CPU; "
        f"random weights of {dynamic['weights_bytes'] / MIB:.0f} MiB: mechanics, not quality",
        f"one layer's full keys and values: {layer / MIB:.1f} MiB; other activations of a "
        f"forward: {(no_cache['growth_bytes'] - layer) / MIB:.1f} MiB",
        f"{'cache':26} {'KV MiB held':>12} {'ratio':>6} {'+ one layer':>12} {'peak growth':>12} "
        f"{'ratio':>6} {'other':>8} {'peak MiB':>9} {'s':>6}",
    ]
    for row in results:
        held = row["kv_bytes"]
        lines.append(
            f"{row['variant']:26} {held / MIB:12.1f} {held / dynamic['kv_bytes']:6.3f} "
            f"{(held + layer) / MIB:12.1f} {row['growth_bytes'] / MIB:12.1f} "
            f"{row['growth_bytes'] / dynamic['growth_bytes']:6.3f} "
            f"{other_bytes(row, no_cache) / MIB:8.1f} {row['peak_bytes'] / MIB:9.1f} "
            f"{row['seconds']:6.1f}"
        )
    return "\n".join(lines)


def page_table(results: list[dict[str, Any]]) -> str:
    """The same in Markdown, MiB; docs/cache.md shows the committed results."""
    no_cache = next(row for row in results if row["variant"] == NO_CACHE)
    rows = []
    for row in results:
        held, other = row["kv_bytes"], other_bytes(row, no_cache)
        sizes = (held, held + row["layer_bytes"], row["growth_bytes"], other)
        rows.append([row["variant"], *(f"{size / MIB:.1f}" for size in sizes)])
    headings = ["", "KV held", "+ one layer", "peak growth", "other"]
    return markdown(headings, rows, numbers_from=1, tight=True)


if __name__ == "__main__":
    main()
