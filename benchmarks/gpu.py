"""Decode speed on a GPU: kernels beside copy bandwidth, models beside transformers' own caches.

    python benchmarks/gpu.py OUT.json [--minutes 8.5]
    python benchmarks/gpu.py OUT.json --dry    # every section, tiny, on a CPU: is the script whole?

Weights are random, made on the device in bfloat16 in the shapes of 1B and 8B Llama models; caches
are filled with random numbers instead of prompts. So the figures are speed and bytes of decode
steps, and say nothing about quality. OUT is rewritten after every row: a run that is cut off leaves
what it measured. Rows that the time or the memory does not allow say so.

Sections, most important first:
  copy    bytes read and written per second by the device's own copy: the yardstick
  split   decode_pieces over int8, int4, fp8 and bfloat16, 4k to 128k tokens, batch 1 to 64, beside
          torch's scaled_dot_product_attention on bfloat16
  step    one layer's whole decode step: attention, scores, eviction, storage
  model   8B and 1B: DynamicCache, StaticCache and ours with CUDA graphs, at 100 % and 20 %, also
          compiled where time allows; `floor_ms` is bytes of weights and cache over the bandwidth
  memory  tokens per second of the largest batch whose cache fits the same bytes
  peers   OffloadedCache and QuantizedCache, where they run
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from kvcompress.atomic import write_file
from kvcompress.bench.entries import held_bytes, step_weight_bytes
from kvcompress.measure import caches
from kvcompress.runtime.names import as_argument

SIZES = {
    "8b": dict(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, dim=128, vocab=128256),
    "1b": dict(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, dim=64, vocab=128256),
    "dry": dict(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, dim=16, vocab=64),
}
SPARE = 256  # tokens that a cache has room for beyond its context
ROUNDS = 3


class Run:
    """What is measured, the time left for it, and where it is written."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.started, self.seconds = time.monotonic(), minutes * 60
        self.results: dict[str, Any] = {"conditions": conditions(dry), "rows": []}
        self.bandwidth = 0.0
        self.save()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.started, 1)
        write_file(self.out, json.dumps(self.results, indent=1) + "\n")

    def row(self, section: str, need: float, measure: Callable[[], dict[str, Any]], **what: Any):
        """Measure one row, unless less than `need` seconds are left; errors become the row."""
        found: dict[str, Any] = {"section": section, **what}
        begun = time.monotonic()
        if self.left() < need:
            found["not_run"] = "out of time"
        else:
            try:
                found |= measure()
            except torch.cuda.OutOfMemoryError:
                found["not_run"] = "out of memory"
            except Exception as error:  # a peer that fails is a result, not the end of the run
                if self.dry and not what.get("may_fail"):
                    raise
                found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        free(self.device)
        found["took_s"] = round(time.monotonic() - begun, 2)
        self.results["rows"].append(found)
        self.save()
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def rows(
        self, section: str, need: float, cases: dict[str, Callable[[], dict[str, Any]]], **what: Any
    ) -> None:
        """A row for each way to hold a cache."""
        for cache, measure in cases.items():
            self.row(section, need, measure, cache=cache, **what)

    def time_ms(self, call: Callable[[], Any], budget_ms: float = 60.0) -> float:
        """Median of one call; on a GPU with its second-level cache emptied before each."""
        if self.dry:
            begun = time.perf_counter()
            call()
            return (time.perf_counter() - begun) * 1e3
        from triton.testing import do_bench

        return float(do_bench(call, warmup=15, rep=budget_ms, return_mode="median"))


def free(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def conditions(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dry": dry,
        "fills": "synthetic: random weights, random caches; speed and bytes, not quality",
    }
    if dry:
        return found | {"device": "cpu"}
    import triton

    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        clocks = subprocess.run(smi, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        clocks = f"not readable: {error}"
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "units": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        query: clocks,
    }


# ---- kernels
def copy_bandwidth(run: Run) -> dict[str, Any]:
    size = 1 << (20 if run.dry else 32)
    source = torch.empty(size, dtype=torch.uint8, device=run.device).random_()
    target = torch.empty_like(source)
    ms = run.time_ms(lambda: target.copy_(source), 300.0)
    run.bandwidth = 2 * size / ms / 1e6
    return {"bytes": 2 * size, "ms": ms, "GB_per_s": run.bandwidth}


def split_inputs(
    run: Run, storage: str, context: int, batch: int, dim: int = 0, most: int = 0
) -> tuple[tuple[Any, ...], int]:
    """Arguments of decode_pieces over equal full segments, and the bytes it reads.

    Args:
        dim: channels of a head, 0 as in 8B; most: longest piece, 0 as the table has it.
    """
    from kvcompress.kernels import tuning, view
    from kvcompress.quant.codec import has_minimum, row_elements, value_groups

    size = SIZES["dry" if run.dry else "8b"]
    heads, rows = size["kv_heads"], size["heads"] // size["kv_heads"]
    dim = dim or size["dim"]
    slots, device = batch * heads * context, run.device

    def codes(groups: int) -> view.CodesView:
        if storage == "model":
            filled = torch.empty(slots + 1, dim, dtype=torch.bfloat16, device=device)
            return view.CodesView(filled.normal_(), None, None, storage, dim, groups)
        row = row_elements(storage, dim)
        data = torch.empty(slots + 1, row, dtype=torch.uint8, device=device).random_(0, 120)
        if storage == "fp8":
            data = data.view(torch.float8_e4m3fn)
        scale = torch.full((slots + 1, groups), 0.01, dtype=torch.float16, device=device)
        minimum = -scale * 8 if has_minimum(storage) else None
        return view.CodesView(data, scale, minimum, storage, dim, groups)

    k, v = codes(1), codes(value_groups(storage, dim))
    config = tuning.split_config(storage, storage, dim, device)
    chunk = tuning.chunk_tokens(slots, most or config.chunk_tokens, device)
    segments = [
        ((b * heads + h) * context, context, b, h) for b in range(batch) for h in range(heads)
    ]
    work = torch.tensor(tuning.work_list(segments, chunk), device=device)
    base = torch.tensor([first for first, *_ in segments], device=device).view(batch, heads)
    position = torch.arange(slots + 1, device=device, dtype=torch.int32) % context
    query, key = (
        torch.randn(batch, count, 1, dim, device=device, dtype=torch.bfloat16)
        for count in (heads * rows, heads)
    )
    out = [torch.empty(len(work), rows, *tail, device=device) for tail in ((dim,), (), ())]
    constants = (make(heads, dim, device=device) for make in (torch.zeros, torch.ones))
    start = torch.zeros(batch, dtype=torch.int32, device=device)
    arguments = (
        view.TokenView(query, key, key, None),
        view.HeadsView(torch.arange(heads, device=device), view.KeyConstants(*constants), base),
        view.GroupView(k, v, position, None, None),
        view.PiecesView(work, base, 0, 0, chunk),
        view.RowsView(torch.tensor(context + 1, device=device), start, start, None, None),
        view.Softmax(dim**-0.5),
        view.Reach(0, 0),
        view.PartsView(*out),
        None,
    )
    held = [t for t in (*k[:3], *v[:3], position) if t is not None]
    return arguments, sum(t.numel() * t.element_size() for t in held)


def measure_split(run: Run, storage: str, context: int, batch: int) -> dict[str, Any]:
    if run.dry:
        from kvcompress.kernels.decode_split.reference import decode_pieces
    else:
        from kvcompress.kernels.decode_split.triton import decode_pieces
    arguments, read = split_inputs(run, storage, context, batch)
    ms = run.time_ms(lambda: decode_pieces(*arguments))
    pieces = arguments[3]
    return {
        "bytes": read,
        "ms": ms,
        "GB_per_s": read / ms / 1e6,
        "of_copy": read / ms / 1e6 / run.bandwidth,
        "pieces": len(pieces.work),
        "chunk": pieces.longest,
    }


def measure_sdpa(run: Run, context: int, batch: int) -> dict[str, Any]:
    size = SIZES["dry" if run.dry else "8b"]
    shape = (batch, size["kv_heads"], context, size["dim"])
    key, value = (
        torch.empty(shape, dtype=torch.bfloat16, device=run.device).normal_() for _ in range(2)
    )
    query = torch.randn(
        batch, size["heads"], 1, size["dim"], dtype=torch.bfloat16, device=run.device
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    ms = run.time_ms(lambda: attend(query, key, value, enable_gqa=True))
    read = 2 * key.numel() * 2
    return {"bytes": read, "ms": ms, "GB_per_s": read / ms / 1e6}


def kernels(run: Run) -> None:
    run.row("copy", 5, lambda: copy_bandwidth(run))
    if not run.bandwidth:
        sys.exit("the copy could not be measured, so nothing could be compared with it")
    cases = [(32768, 16), (4096, 1), (4096, 16), (4096, 64), (32768, 1), (32768, 64)]
    cases += [(131072, 1), (131072, 4), (131072, 16)]
    need = 20 if run.dry else 300
    for context, batch in [(40, 2)] if run.dry else cases:
        what = {"context": context, "batch": batch}
        for storage in ("int8", "int4", "fp8", "model"):
            measure = partial(measure_split, run, storage, context, batch)
            run.row("split", need, measure, storage=storage, **what)
        measure = partial(measure_sdpa, run, context, batch)
        run.row("split", need, measure, storage="sdpa bfloat16", **what)


# ---- models
def make_model(run: Run, name: str) -> Any:
    """Random weights, made on the device."""
    size = SIZES[name]
    config = transformers.LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=size["dim"],
        max_position_embeddings=262144,
        rope_theta=500000.0,
        tie_word_embeddings=name == "1b",
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with run.device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def our_plan(model: Any, share: float) -> Any:
    """int8; everything, or this share of the context: half heavy hitters, half newest."""
    from kvcompress.plan import Budget, HeadPlan, uniform
    from kvcompress.runtime.model.families import shape_of

    parts = Budget(ratio=share / 2)
    head = HeadPlan(full=True) if share == 1 else HeadPlan(frequent=parts, local=parts)
    shape = shape_of(model.config, model.dtype)
    return uniform(shape, head, max_position=262144)


def our_cache(run: Run, model: Any, share: float, context: int, batch: int) -> Any:
    """A static cache that holds `context` random tokens, as a prompt would have left them."""
    import kvcompress

    cache = kvcompress.StaticCompressedCache(
        our_plan(model, share), batch=batch, max_tokens=context + SPARE, prompt_tokens=context
    )
    size = model.config
    token = torch.zeros(
        batch, size.num_key_value_heads, 1, size.head_dim, dtype=model.dtype, device=run.device
    )
    for layer in cache.static_layers:
        layer.lazy_initialization(token, token)
        fill(layer.fixed, context)
        layer.growing.ready, layer.frozen = None, True
    return cache


def fill(state: Any, context: int) -> None:
    """Random codes everywhere; positions that leave no slot empty."""
    settings = state.settings
    exact = settings.exact_tokens
    state.exact_k.normal_()
    state.exact_v.normal_()
    held = torch.arange(exact, device=state.start.device)
    held[settings.sink_tokens :] += context - exact
    state.exact_position.copy_(held)
    state.start.zero_()
    for tensor, value in ((state.row_seen, context), (state.budget_length, context)):
        tensor.fill_(value)
    state.counter.fill_(context)
    for group in state.groups:
        for codes in (group.keys, group.values):
            data = codes.data
            data = data.view(torch.uint8) if data.element_size() == 1 else data
            data.random_(0, 255) if data.dtype == torch.uint8 else data.normal_()
            if codes.scale is not None:
                codes.scale.fill_(0.01)
            if codes.minimum is not None:
                codes.minimum.fill_(-1.28)
        for block in group.blocks:
            if block.capacity:
                newest = torch.arange(block.capacity, device=state.start.device)
                newest = newest * max(1, (context - exact) // block.capacity) + exact
                newest = newest.masked_fill(newest >= context, -1)  # a full head's spare slots
                block.view(group.position).copy_(newest.int().expand_as(block.view(group.position)))
                state.budget[:, block.span] = block.capacity
                local = settings.heads[block.heads[0]].local
                state.windows[:, block.span] = local.resolve(context) if local else 0
        if group.score is not None:
            group.score.random_(0, 1000)


def their_cache(run: Run, model: Any, kind: str, context: int, batch: int, **settings: Any) -> Any:
    """One of transformers' caches with `context` random tokens."""
    config = model.config
    if kind == "StaticCache":
        cache = transformers.StaticCache(config=config, max_cache_len=context + SPARE)
    elif kind == "QuantizedCache":
        cache = transformers.QuantizedCache(config=config, **settings)
    else:
        cache = transformers.DynamicCache(config=config, offloading=kind == "OffloadedCache")
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    key, value = (
        torch.empty(shape, dtype=model.dtype, device=run.device).normal_() for _ in range(2)
    )
    return caches.fill(cache, (key, value), config.num_hidden_layers)


def captured(run: Run, step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph, after two eager calls; itself in a dry run."""
    step()
    step()
    if run.dry:
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def steps_ms(run: Run, step: Callable[[], Any], count: int = 12) -> list[float]:
    """Milliseconds of a step, by round; the second-level cache is as the step leaves it."""
    rounds = []
    for _ in range(1 if run.dry else ROUNDS):
        if run.dry:
            begun = time.perf_counter()
            step()
            rounds.append((time.perf_counter() - begun) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / count)
    return rounds


def measured(run: Run, model: Any, step: Callable[[], Any], cache: Any, batch: int) -> dict:
    rounds = steps_ms(run, step)
    ms = statistics.median(rounds)
    held, weights = held_bytes(cache), step_weight_bytes(model)
    floor = (weights + held) / run.bandwidth / 1e6
    return {
        "ms": ms,
        "rounds_ms": rounds,
        "tokens_per_s": batch / ms * 1e3,
        "cache_bytes": held,
        "weight_bytes": weights,
        "floor_ms": floor,
        "over_floor": ms / floor,
        "peak_bytes": 0 if run.dry else torch.cuda.max_memory_allocated(),
    }


@torch.no_grad()
def measure_ours(
    run: Run, model: Any, share: float, context: int, batch: int, compiled: bool, graph: bool = True
) -> dict[str, Any]:
    import kvcompress
    from kvcompress.runtime.static.cuda_graph import DecodeGraph

    kvcompress.attach(model, our_plan(model, share))
    try:
        cache = our_cache(run, model, share, context, batch)
        torch._dynamo.reset()
        backend = "eager" if run.dry else "inductor"
        step = torch.compile(model, fullgraph=True, backend=backend) if compiled else None
        decode = DecodeGraph(model, cache, step, capture=graph and not run.dry)
        ids = torch.full((batch, 1), 7, device=run.device)
        for _ in range(4):
            decode(ids)
        kernels = cache.static_layers[0].tables is not None
        return measured(run, model, lambda: decode(ids), cache, batch) | {"triton": kernels}
    finally:
        kvcompress.detach(model)


@torch.no_grad()
def measure_theirs(
    run: Run,
    model: Any,
    kind: str,
    context: int,
    batch: int,
    compiled: bool = False,
    graph: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    cache = their_cache(run, model, kind, context, batch, **settings)
    ids = torch.full((batch, 1), 7, device=run.device)
    position = torch.full((batch, 1), context, device=run.device)
    call: Any = model
    if compiled:
        torch._dynamo.reset()
        mode = {"backend": "eager"} if run.dry else {"mode": "reduce-overhead"}
        call = torch.compile(model, fullgraph=True, **mode)

    def step() -> Any:
        return call(
            input_ids=ids, position_ids=position, **as_argument(cache), logits_to_keep=1
        ).logits

    for _ in range(3):
        step()
    run_step = captured(run, step) if graph else step
    return measured(run, model, run_step, cache, batch)


def model_rows(run: Run, name: str, model: Any, context: int, batch: int, compile_s: float) -> None:
    """Every cache at one context and batch; `compile_s` is what compiling may take, 0 for never."""
    what = {"model": name, "context": context, "batch": batch}
    ours = partial(measure_ours, run, model, context=context, batch=batch)
    theirs = partial(measure_theirs, run, model, context=context, batch=batch)
    eager = {
        "ours int8 20%, CUDA graph": partial(ours, share=0.2, compiled=False),
        "ours int8 100%, CUDA graph": partial(ours, share=1.0, compiled=False),
        "StaticCache, CUDA graph": partial(theirs, kind="StaticCache", graph=True),
        "DynamicCache": partial(theirs, kind="DynamicCache"),
    }
    compiled = {
        "ours int8 20%, compiled, CUDA graph": partial(ours, share=0.2, compiled=True),
        "StaticCache, compiled (reduce-overhead)": partial(
            theirs, kind="StaticCache", compiled=True
        ),
    }
    run.rows("model", 15, eager, **what)
    if compile_s:
        run.rows("model", compile_s, compiled, **what)


def step_rows(run: Run, model: Any, name: str, context: int, batch: int) -> None:
    """One layer's decode step without the rest of the model."""
    from kvcompress.runtime.layer.call import AttentionCall
    from kvcompress.runtime.static.step import decode_step
    from kvcompress.runtime.static.triton_step import triton_step

    def measure(share: float) -> dict[str, Any]:
        cache = our_cache(run, model, share, context, batch)
        layer = cache.static_layers[0]
        state, config = layer.fixed, model.config

        def rows(heads: int) -> torch.Tensor:
            shape = (batch, heads, 1, config.head_dim)
            return torch.randn(shape, device=run.device).to(model.dtype)

        token = (rows(config.num_attention_heads), *(rows(config.num_key_value_heads),) * 2)
        scaling = config.head_dim**-0.5
        call, rest = AttentionCall(*token, None, scaling), (None, None, scaling, None, None)
        if layer.tables is None:
            ms = run.time_ms(lambda: decode_step(state, call, None, None))
        else:
            ms = run.time_ms(lambda: triton_step(state, layer.tables, *token, *rest))
        return {"ms": ms, "bytes": state.nbytes(), "GB_per_s": state.nbytes() / ms / 1e6}

    cases = {f"int8 {share:.0%}": partial(measure, share) for share in (0.2, 1.0)}
    run.rows("step", 15, cases, model=name, context=context, batch=batch)


def fixed_memory(run: Run, model: Any, name: str, context: int, budget: int) -> None:
    """Tokens per second of the largest batch whose cache takes at most `budget` bytes."""
    from kvcompress.runtime.static.cache import static_cache_bytes

    config = model.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    static = max(1, budget // (row * (context + SPARE)))
    what = {"model": name, "context": context, "budget_bytes": budget}
    run.row(
        "memory",
        20,
        partial(measure_theirs, run, model, "StaticCache", context, static, graph=True),
        cache="StaticCache, CUDA graph",
        batch=static,
        **what,
    )
    for share in (1.0, 0.2):
        one = static_cache_bytes(our_plan(model, share), 1, context + SPARE, context)
        batch = max(1, budget // one)
        run.row(
            "memory",
            20,
            partial(measure_ours, run, model, share, context, batch, False),
            cache=f"ours int8 {share:.0%}, CUDA graph",
            batch=batch,
            **what,
        )


def peers(run: Run, model: Any, name: str, context: int, batch: int) -> None:
    theirs = partial(measure_theirs, run, model, context=context, batch=batch)
    cases = {"OffloadedCache": partial(theirs, kind="OffloadedCache")}
    for backend in ("quanto", "hqq", "fp8"):
        cases[f"QuantizedCache {backend}"] = partial(theirs, kind="QuantizedCache", backend=backend)
    run.rows("peers", 15, cases, model=name, context=context, batch=batch, may_fail=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="of everything")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        sys.exit("benchmarks/gpu.py: torch sees no CUDA device; --dry tries the script on a CPU")
    run = Run(args.out, args.minutes, args.dry)
    kernels(run)
    if run.dry:
        model = make_model(run, "dry")
        step_rows(run, model, "dry", 40, 2)
        model_rows(run, "dry", model, 40, 2, 1)
        fixed_memory(run, model, "dry", 40, 200_000)
        peers(run, model, "dry", 40, 1)
        return
    model = make_model(run, "8b")
    large = run.results["conditions"]["memory_bytes"] > 120e9
    step_rows(run, model, "8b", 32768, 16)
    # compiled StaticCache at 32k × 16 needs 85 GB: on a smaller device the row says so, and batch 8
    # stands for it
    for batch, compile_s in ((16 if large else 8, 75), (1, 75)):
        model_rows(run, "8b", model, 32768, batch, compile_s)
    if not large:
        model_rows(run, "8b", model, 32768, 16, 0)
    fixed_memory(run, model, "8b", 32768, 24 * 10**9)
    model_rows(run, "8b", model, 131072, 1, 0)
    del model
    free(run.device)
    model = make_model(run, "1b")
    for context, batch in ((4096, 1), (32768, 16), (4096, 64)):
        model_rows(run, "1b", model, context, batch, 40 if batch == 1 else 0)
    peers(run, model, "1b", 4096, 4)


if __name__ == "__main__":
    main()
