"""What each code of keys and values costs on a real model: KL, agreement, answers, bits and time.

    python benchmarks/codes.py --model DIR --model DIR     # results/codes/*.json, docs/codes.md
    python benchmarks/codes.py --speed                     # results/codes/speed.json, the page
    python benchmarks/codes.py --page                      # the page anew

Every head keeps every token, in one code for keys and one for values, with key constants from a
uniform profile. Nothing is evicted, so all that is lost is lost by the code. Formulas of other
projects stand beside them. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import torch
from code_rivals import FORMULAS, RECENT, SINKS
from studies import RESULTS, ROOT, Record, shown, stated

from kvcompress.accounting import slot_bytes
from kvcompress.atomic import write_file
from kvcompress.cli.progress import progress
from kvcompress.evaluate.drawing import Sizes, WorkloadSuite
from kvcompress.evaluate.workloads import KNOWN, make_workloads
from kvcompress.evaluate.workloads_run import reference_logits, run_workload
from kvcompress.evaluate.workloads_table import RANKED_FROM
from kvcompress.kernels.cpu.library import library
from kvcompress.measure import machine
from kvcompress.measure.cells import Book, load_json
from kvcompress.measure.stats import interval
from kvcompress.measure.tables import markdown
from kvcompress.measure.timing import case_of, interleave
from kvcompress.plan import HeadPlan, ModelShape, Plan, uniform
from kvcompress.profile.run import run
from kvcompress.profile.source import load_source, weights_hash
from kvcompress.quant.keystats import KVParams
from kvcompress.recipe import Calibration, Recipe, UniformPolicy
from kvcompress.runtime.layer.call import AttentionCall, ForwardInfo
from kvcompress.runtime.layer.layer import CompressedLayer
from kvcompress.runtime.model.families import shape_of
from kvcompress.runtime.store.state import LayerSettings

FOLDER: Final = RESULTS / "codes"
PAGE: Final = ROOT / "docs" / "codes.md"
RUNS: Final = ROOT / "runs" / "codes"
PARTS: Final = 100
PAIRS: Final = (
    *("int8/int8", "fp8/fp8", "int8/int4", "int8/rot4", "int4/int4", "rot4/rot4", "rot4/rot3"),
    *("rot4/rot2", "rot3/rot4", "rot3/rot3", "rot3/rot2", "rot2/rot2"),
)
SPEEDS: Final = ("int8/int8", "int4/int4", "rot4/rot4", "rot3/rot3", "rot4/rot2", "rot2/rot2")
BEFORE: Final = "int4/int4"  # what speeds are beside
SPEED_DIMS, SPEED_TOKENS, SPEED_LAYERS, SPEED_HEADS, SPEED_QUERIES = (64, 128), 4096, 8, 4, 3
_HEAD: Final = f"""\
# Codes of keys and values

Every head keeps every token; keys are stored in one code and values in another. Nothing is evicted,
so what is lost is lost by the code. This page is made by `benchmarks/codes.py`; no number on it is
typed by hand.

`rot4`, `rot3` and `rot2` are levels of rotated vectors (kvcompress/quant/codes/rotated.py), `int8`
and `int4` equal steps from a minimum, all over the keys' static centre and scale. The other rows
are formulas of other projects on transformers' cache, which holds the first {SINKS} and the newest
{RECENT} tokens exactly, as ours does. *Bits* are of one number with its scales; *with everything*
is the cache's own memory, with positions and exact tokens, as a share of 16 bits. KL is to the full
cache, in nats per token behind a text, with its 95 % interval; *agree* is the share of tokens whose
likeliest prediction is the full cache's. Tokens that come behind a text stay exact in the other
rows, and are coded in ours once 16 newer ones have come.
"""


def measure(arguments: argparse.Namespace, directory: str) -> None:
    """Every cell of one model, into results/codes/NAME.json."""
    name = Path(directory).resolve().name
    model, tokenizer = load_source(directory, arguments.device, dtype="float32")
    shape = shape_of(model.config, model.dtype)
    said = stated(
        model_file=weights_hash(model)[:16],
        processor=machine.cpu_words(),
        dtype="float32; bytes are those of 16 bits",
        samples=arguments.samples,
        windows=arguments.windows,
    )
    book = Book(arguments.results / f"{name}.json", {**said, "model": name})

    @cache
    def suite(workload: str, context: int) -> tuple[WorkloadSuite, torch.Tensor | None]:
        sizes = Sizes(context, shape.max_position, windows=arguments.windows)
        (drawn,) = make_workloads(tokenizer, sizes, names=(workload,), samples=arguments.samples)
        return drawn, reference_logits(model, tokenizer, drawn)

    @cache
    def params() -> KVParams:
        policy = UniformPolicy(kind="uniform", head=HeadPlan(full=True))
        recipe = Recipe(name="constants", policy=policy, calibration=Calibration(prompts=4))
        where = arguments.runs / name
        with progress(f"{name}: key constants", PARTS) as told:
            steps = lambda done, total: told(PARTS * done // total)  # noqa: E731
            return run(model, tokenizer, recipe, where, steps).load_params(where)

    def cell(workload: str, context: int, code: str) -> Record:
        drawn, logits = suite(workload, context)
        if code in FORMULAS:
            rival = FORMULAS[code].rival(code, model.config)
            done = run_workload(model, tokenizer, drawn, reference=logits, rival=rival)
            bits = FORMULAS[code].bits(shape.head_dim)
            exact = (SINKS + RECENT) / context
            whole = bits * (1 - exact) + 16 * exact
        else:
            plan = _plan(shape, code)
            done = run_workload(model, tokenizer, drawn, plan, params(), reference=logits)
            (head,) = set(plan.heads[0])
            numbers = shape.head_dim + shape.v_dim
            bits = 8 * (slot_bytes(head, shape) - 4) / numbers  # its position aside
            whole = 16 * done.kv_bytes / done.kv_bytes_bf16
        return {
            "bits": round(bits, 4),
            "bits_with_everything": round(whole, 4),
            "kl_nats": None if done.kl_nats is None else [round(x, 6) for x in done.kl_nats],
            "flips": None if done.flips is None else [round(x, 6) for x in done.flips],
            "hits": "".join(str(int(hit == 1)) for hit in done.hits) if drawn.samples else None,
            "answer_nats": [round(x, 4) for x in done.answer_nats or ()],
        }

    for workload in arguments.workloads:
        for context in arguments.contexts if KNOWN[workload].text else arguments.contexts[:1]:
            for code in arguments.codes:
                book.get(f"{workload}|{context}|{code}", partial(cell, workload, context, code))
                print(f"{name}: {workload}, {context} tokens, {code}", flush=True)


def _plan(shape: ModelShape, code: str) -> Plan:
    k, v = code.split("/")
    return uniform(shape, HeadPlan(full=True, k_dtype=k, v_dtype=v))  # type: ignore[arg-type]


# ---- speed
def speed(arguments: argparse.Namespace) -> None:
    """A decode step's attention and storage, every code once per round."""
    torch.set_num_threads(1)
    kernels = library()
    assert kernels is not None, "the C kernels were not built"
    said = stated(
        processor=machine.cpu_words(),
        step=f"{SPEED_HEADS} KV heads, {SPEED_QUERIES} queries each, {SPEED_TOKENS} tokens",
    )
    book = Book(arguments.results / "speed.json", {**said, "model": "none"})
    best = kernels.isa
    for isa in dict.fromkeys((best, "avx2")):
        for dim in SPEED_DIMS:
            kernels.use_isa(isa)
            book.get(f"{isa}|{dim}", partial(_speed, dim))
    kernels.use_isa(best)


def _speed(dim: int) -> Record:
    cases = [case_of(code, _step(_layers(code, dim))) for code in SPEEDS]
    found = interleave(cases, rounds=20, steps=2)
    return {
        code: [round(1e3 * x / SPEED_LAYERS, 2) for x in found[code].wall_ms()] for code in SPEEDS
    }


def _layers(code: str, dim: int) -> list[CompressedLayer]:
    shape = ModelShape(
        model_type="none",
        config_hash="0",
        layers=1,
        query_heads=SPEED_HEADS * SPEED_QUERIES,
        kv_heads=SPEED_HEADS,
        head_dim=dim,
        sliding_windows=(None,),
        model_dtype_bytes=4,
        max_position=65536,
    )
    constants = (torch.zeros(SPEED_HEADS, dim),), (torch.ones(SPEED_HEADS, dim),)
    settings = LayerSettings(_plan(shape, code), KVParams(*constants), 0)
    layers = [CompressedLayer(settings) for _ in range(SPEED_LAYERS)]
    for layer in layers:
        _feed(layer, dim, SPEED_TOKENS)
    return layers


def _step(layers: list[CompressedLayer]) -> Callable[[], object]:
    dim = layers[0].state.exact_k.shape[-1]  # type: ignore[union-attr]
    return lambda: [_feed(layer, dim, 1) for layer in layers]


def _feed(layer: CompressedLayer, dim: int, tokens: int) -> None:
    key, value = (torch.randn(1, SPEED_HEADS, tokens, dim) for _ in range(2))
    query = torch.randn(1, SPEED_HEADS * SPEED_QUERIES, tokens, dim)
    layer.announce(ForwardInfo())
    layer.update(key, value)
    layer.forward(AttentionCall(query, key, value, None, dim**-0.5))


# ---- page
def page(folder: Path) -> str:
    lines = [_HEAD]
    for path in sorted(folder.glob("*.json")):
        content: Any = load_json(path.read_text(encoding="utf-8"))
        cells = {tuple(key.split("|")): cell for key, cell in content["cells"].items()}
        if path.stem == "speed":
            lines += ["## Speed", "", *_speeds(cells)]
        else:
            lines += [f"## {content['conditions']['model']}", "", *_losses(cells), *_beaten(cells)]
        told = ", ".join(f"{name}: {value}" for name, value in content["conditions"].items())
        lines += [f"Conditions: {told}.", ""]
    known = [f"- **{name}**: {formula.about}" for name, formula in FORMULAS.items()]
    return "\n".join([*lines, "## Formulas of other projects", "", *known, ""])


def _losses(cells: dict[tuple[str, ...], Record]) -> list[str]:
    texts = list(dict.fromkeys(key[:2] for key in cells))
    codes = dict.fromkeys(key[2] for key in cells)
    first = {code: next(c for key, c in cells.items() if key[2] == code) for code in codes}
    heads, rows = ["keys/values", "bits", "with everything"], []
    for workload, context in texts:
        if KNOWN[workload].text:
            heads += [f"KL, {workload} {context}", "agree"]
        else:
            heads += [f"{workload} right", "nats"]
    for code in sorted(codes, key=lambda code: -first[code]["bits"]):
        row = [code, f"{first[code]['bits']:.2f}", f"{first[code]['bits_with_everything']:.2f}"]
        for text in texts:
            row += _found(cells.get((*text, code)))
        rows.append(row)
    return [markdown(heads, rows, numbers_from=1, tight=True), ""]


def _beaten(cells: dict[tuple[str, ...], Record]) -> list[str]:
    """Where another project's formula loses less than ours in no more bits."""
    lines = []
    for text in dict.fromkeys(key[:2] for key in cells):
        here = {key[2]: cell for key, cell in cells.items() if key[:2] == text and cell["kl_nats"]}
        for code, own in here.items():
            if code in FORMULAS:
                continue
            better = [
                f"{name} ({fmean(cell['kl_nats']):.4f})"
                for name, cell in here.items()
                if name in FORMULAS
                and cell["bits"] <= own["bits"]
                and fmean(cell["kl_nats"]) < fmean(own["kl_nats"])
            ]
            if better:
                mean = fmean(own["kl_nats"])
                lines.append(f"- {text[0]}, {code} ({mean:.4f}): {', '.join(better)}")
    if not lines:
        return []
    return ["In no more bits, by the mean, another formula loses less than", "", *lines, ""]


def _found(cell: Record | None) -> list[str]:
    if cell is None:
        return ["", ""]
    if cell["kl_nats"] is not None:
        agree = 100 * (1 - fmean(cell["flips"]))
        return [shown(interval(cell["kl_nats"]), 1, 4), f"{agree:.1f} %"]
    right = fmean(int(hit) for hit in cell["hits"])
    low = ", not ranked" if right < RANKED_FROM else ""
    return [f"{100 * right:.0f} %{low}", shown(interval(cell["answer_nats"]), 1, 3)]


def _speeds(cells: dict[tuple[str, ...], Record]) -> list[str]:
    rows = []
    for (isa, dim), times in sorted(cells.items()):
        for code in SPEEDS:
            ratio = median(a / b for a, b in zip(times[code], times[BEFORE], strict=True))
            rows.append([isa, dim, code, f"{median(times[code]):.0f}", f"{ratio:.2f}"])
    heads = ["instructions", "channels", "keys/values", "µs a layer", f"beside {BEFORE}"]
    said = (
        "Attention over the codes and storage of one token, in one interleaved run; the ratio is "
        "the median over rounds."
    )
    return [said, "", markdown(heads, rows, numbers_from=3, tight=True), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", default=[], help="directory; several times")
    every = [*PAIRS, *FORMULAS]
    parser.add_argument("--codes", type=lambda s: s.split(","), default=every, help="K/V,…")
    parser.add_argument("--workloads", type=lambda s: s.split(","), default=["prose", "code"])
    parser.add_argument(
        "--contexts", type=lambda s: [int(x) for x in s.split(",")], default=[2048], help="tokens"
    )
    parser.add_argument("--samples", type=int, default=24, help="questions a workload")
    parser.add_argument("--windows", type=int, default=4, help="of text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the key constants")
    parser.add_argument("--speed", action="store_true", help="time decode steps")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    arguments = parser.parse_args()
    for model in [] if arguments.page else arguments.model:
        measure(arguments, model)
    if arguments.speed and not arguments.page:
        speed(arguments)
    if arguments.results == FOLDER:
        write_file(PAGE, page(FOLDER))
        print(f"page written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
