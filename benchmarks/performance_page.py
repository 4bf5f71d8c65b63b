"""Turn benchmarks/results/speed/*.json into docs/performance.md and its pictures.

python benchmarks/performance_page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode
import fixed_memory
import host_overhead
import kernel
import prefill
import scaling
import speed_quality
from pages.speed_plots import draw_decode, draw_fixed_memory, draw_kernel, draw_scaling
from speed.harness import RESULTS
from speed.text import sections
from speed.workers import ROOT

from kvcompress.bench.result import Cell, Result

PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "figures"
TEMPLATE = Path(__file__).parent / "pages" / "performance.md"
NAMES = ("decode", "kernel", "fixed_memory", "prefill", "scaling")
GIB = 2**30
Quality = Callable[[str | None], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args()
    found = load(args.results)
    draw(found, args.figures)
    texts = (plain(args.results, "quality"), plain(args.results, "host_overhead"))
    args.page.write_text(render(found, *texts), encoding="utf-8")


def load(folder: Path) -> dict[str, Result]:
    """The results that are there."""
    paths = {name: folder / f"{name}.json" for name in NAMES}
    return {name: Result.load(path) for name, path in paths.items() if path.is_file()}


def plain(folder: Path, name: str) -> dict[str, Any]:
    """A file that holds no cells, empty where it is not there."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def render(found: dict[str, Result], quality: dict[str, Any], host: dict[str, Any]) -> str:
    """The page."""
    cells = quality.get("cells", {})

    def words(name: str | None) -> str:
        return speed_quality.words(cells, name)

    parts: dict[str, Callable[[Result, Quality], list[str]]] = {
        "decode": decode_parts,
        "kernel": kernel_parts,
        "fixed_memory": fixed_memory_parts,
        "prefill": lambda result, words: sections(result.cells, prefill.table, "###"),
        "scaling": scaling_parts,
    }
    made = {
        name: "\n\n".join([*part(found[name], words), _made_by(found[name])])
        if name in found
        else _absent(name)
        for name, part in parts.items()
    }
    return TEMPLATE.read_text(encoding="utf-8").format(
        conditions=conditions(found),
        quality=quality_section(quality),
        host_overhead=host_section(host),
        **made,
    )


def decode_parts(result: Result, words: Quality) -> list[str]:
    picture = _picture("decode", "Milliseconds per token of every cache")
    shown = sections(result.cells, lambda cell: decode.table(cell, words), "###")
    return [picture, decode.asked(result), *shown]


def kernel_parts(result: Result, words: Quality) -> list[str]:
    text = (
        "One step is the attention of one token in each of the model's layers over what the cache "
        "holds; ours also stores the token. Bytes are those of the cache, or of the weights."
    )
    picture = _picture("kernel", "Bytes per second of attention kernels")
    return [text, picture, kernel.asked(result), *sections(result.cells, kernel.table, "###")]


def fixed_memory_parts(result: Result, words: Quality) -> list[str]:
    text = (
        "H2O's question (arXiv 2306.14048): every method takes the largest batch that fits the "
        "same KV bytes. *With prompts* counts a prompt for each row, timed for one row alone, and "
        f"{fixed_memory.NEW_TOKENS} new tokens after it."
    )
    picture = _picture("fixed-memory", "Tokens per second within the same bytes")
    shown = sections(result.cells, lambda cell: fixed_memory.table(cell, words), "###")
    return [text, picture, fixed_memory.asked(result), *shown]


def scaling_parts(result: Result, words: Quality) -> list[str]:
    text = (
        "The last column is a straight line through the measured contexts, drawn on to a million "
        "tokens. It was not measured."
    )
    missing = dict.fromkeys(
        f"- not timed at {cell.name}: {each.name}: {each.reason}"
        for cell in result.cells
        for each in cell.missing
    )
    return [
        _picture("scaling", "Milliseconds per token against context"),
        text,
        scaling.context_table(result),
        scaling.batch_table(result),
        *(["\n".join(missing)] if missing else []),
    ]


def quality_section(quality: dict[str, Any]) -> str:
    if not quality:
        return "Not measured yet: `python benchmarks/speed_quality.py`."
    told = quality["conditions"]
    text = (
        f"The shipped model in {told['dtype']}, {told['context_tokens']} tokens, "
        f"{told['questions']} questions, {told['text_windows']}; {quality['date']}, "
        f"torch {told['versions']['torch']}, transformers {told['versions']['transformers']}; "
        "`python benchmarks/speed_quality.py`."
    )
    return f"{speed_quality.table(quality['cells'])}\n\n{text}"


def host_section(host: dict[str, Any]) -> str:
    if not host:
        return _absent("host_overhead")
    text = (
        f"A step with {host['context_tokens']} tokens of context, {host['threads']} thread, by "
        "where its time goes; milliseconds, medians. *kvcompress around it* is our Python, "
        "*transformers* everything else: norms, rotary embedding, activations, module calls."
    )
    return f"{text}\n\n{host_overhead.report(host)}\n\nMade by `{host['command']}`, {host['date']}."


def conditions(found: dict[str, Result]) -> str:
    """What the results have in common, or each one's where they differ."""
    if not found:
        return "**Nothing is measured yet.**"
    lines: dict[str, list[str]] = {}
    for name, result in found.items():
        told = result.conditions
        versions = ", ".join(f"{package} {number}" for package, number in told.versions.items())
        memory = "" if told.memory_bytes is None else f", {told.memory_bytes / GIB:.0f} GiB"
        clock = "" if result.frequency_mhz is None else f" at {result.frequency_mhz:.0f} MHz"
        text = (
            f"{told.cpu}{clock}, {told.cores} cores{memory}; {versions}; malloc: {told.malloc}; "
            f"attention over codes: {told.kernels}. {told.model}."
        )
        lines.setdefault(text, []).append(name)
    parts = [f"**{', '.join(names)}**: {text}" for text, names in lines.items()]
    return "\n\n".join(parts)


def draw(found: dict[str, Result], folder: Path) -> None:
    """The pictures of the results that are there."""
    if "decode" in found:
        draw_decode(found["decode"], folder / "performance-decode")
    if "kernel" in found:
        draw_kernel(_longest(found["kernel"]), folder / "performance-kernel")
    if "fixed_memory" in found:
        cell = found["fixed_memory"].cells[0]
        rates = []
        for row in cell.rows:
            served = fixed_memory.served(row)
            alone = fixed_memory.decoding(row).median
            rates.append((row, alone, None if served is None else served.median))
        draw_fixed_memory(cell, rates, folder / "performance-fixed-memory")
    if "scaling" in found:
        series = scaling.series(found["scaling"])
        lines = {name: scaling.line_of(rows) for name, rows in series.items()}
        fitting = {
            name: (line.start_ms, line.per_token_ms)
            for name, line in lines.items()
            if line is not None and line.fits
        }
        draw_scaling(series, fitting, scaling.MILLION, folder / "performance-scaling")


def _longest(result: Result) -> Cell:
    """The attention cell with the most to read."""
    return max(result.cells, key=lambda cell: max(row.kv_bytes for row in cell.rows))


def _picture(name: str, text: str) -> str:
    return f"![{text}](figures/performance-{name}.svg)"


def _made_by(result: Result) -> str:
    commands = ", ".join(f"`{command}`" for command in result.command.split("; "))
    return f"Made by {commands}, {result.date}."


def _absent(name: str) -> str:
    return f"Not measured yet: `make bench-{name.replace('_', '-')}`."


if __name__ == "__main__":
    main()
