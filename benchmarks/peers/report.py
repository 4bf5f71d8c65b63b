"""Turn benchmarks/results/peers.json into docs/peers.md; no number on that page is typed by hand.

python benchmarks/peers/report.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import words
from rows import ROWS
from words import Record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "peers.md"
SAME_MODELS = 1e-3  # a few logits of each model may differ by rounding between the environments
PLANS = ("key norm", "window votes", "per head 80/20")
PRESSES = ("Knorm", "SnapKV", "ExpectedAttention", "AdaKV(SnapKV)")


def render(data: Record) -> str:
    """The page.

    Raises:
        ValueError: if the two sides did not run the same models or the same sizes.
    """
    kv, own = data["kvpress"], data["kvcompress"]
    here, there = own["conditions"], kv["conditions"]
    pairs = zip(here["fingerprint"], there["fingerprint"], strict=True)
    sizes = [k for k in here if k.endswith("tokens") or k in ("steps", "torch", "dtype")]
    if max(abs(a - b) for a, b in pairs) > SAME_MODELS or any(here[k] != there[k] for k in sizes):
        raise ValueError("the two sides ran other models or sizes: run both again")
    table = ["| situation | kvpress | kvcompress | how measured |", "|---|---|---|---|"]
    for name, (title, how, cells) in ROWS.items():
        left, right = cells(kv[name], own[name])
        table.append(f"| **{title}** | {left} | {right} | {how.format(**here)} |")
    table.append(versions_row(data))
    template = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")
    return template.format(
        **{k: v for k, v in here.items() if k != "transformers"},
        kvpress=there["kvpress"],
        kvpress_transformers=there["transformers"],
        kvcompress_transformers=here["transformers"],
        methods=next(iter(data["kvpress_versions"].values()))["methods"],
        scorers=next(iter(data["kvcompress_versions"].values()))["methods"],
        table="\n".join(table),
        families="\n".join(families_table(kv["families"], own["families"])),
        quantized="\n".join(quantized_table(kv["quantized_cache"], own["quantized_cache"])),
    )


def versions_row(data: Record) -> str:
    cells = []
    for library in ("kvpress", "kvcompress"):
        lines = []
        found = data[f"{library}_versions"]
        for version in sorted(found, key=lambda v: [int(x) for x in v.split(".")]):
            runs = found[version]["runs"]
            text = f"{version}: {len(words.ran(runs))} of {len(runs)} methods run"
            first = next(iter(words.failed(runs).values()), None)
            lines.append(text if first is None else f"{text} (`{first['error']}`)")
        declared = next(iter(found.values()))["declared"]
        cells.append(words.cell(f"declares `{', '.join(declared)}`", lines))
    return f"| **Versions of transformers** | {cells[0]} | {cells[1]} | every method once |"


def families_table(kv: Record, own: Record) -> list[str]:
    """One row per family, one column per method."""
    columns = [f"kvpress {name}" for name in PRESSES] + [f"kvcompress {name}" for name in PLANS]
    lines = [
        "| family | named by kvpress | " + " | ".join(columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for family in dict.fromkeys(name.split(", ")[0] for name in own):
        found = [_outcome(kv, f"{family}, {name}") for name in PRESSES]
        found += [_outcome(own, f"{family}, {name}") for name in PLANS]
        named = "yes" if family in words.NAMED else "no"
        lines.append(f"| {family} | {named} | " + " | ".join(found) + " |")
    return lines


def _outcome(records: Record, name: str) -> str:
    shown = [records[k] for k in (name, f"{name}, model's cache") if k in records]
    return " / ".join(dict.fromkeys(_short(record) for record in shown))


def _short(record: Record) -> str:
    if "error" in record:
        return str(record["error"]).split(":")[0]
    text = words.number(record["gap"])
    agreement = record.get("agreement", 1.0)
    return text if agreement > words.ALL else f"{text}, {agreement:.0%} right"


def quantized_table(kv: Record, own: Record) -> list[str]:
    lines = [
        "| library | cache | bytes, random | error | bytes, trained | error |",
        "|---|---|---|---|---|---|",
    ]
    for library, records in (("kvpress", kv), ("kvcompress", own)):
        for name in sorted({k.rsplit(", ", 1)[0] for k in records} - {"nothing"}):
            cells = []
            for model in ("random weights", "trained"):
                record = records[f"{name}, {model}"]
                share = record["bytes"] / records[f"nothing, {model}"]["bytes"]
                gap = words.number(record["gap"]) if "gap" in record else "not measured"
                cells += [f"{record['bytes']} ({share:.3f})", gap]
            lines.append(f"| {library} | {name} | " + " | ".join(cells) + " |")
    return lines


def load(path: Path) -> Record:
    data: Record = json.loads(path.read_text(encoding="utf-8"))
    return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-i", "--input", type=Path, default=RESULTS)
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    args = parser.parse_args()
    args.output.write_text(render(load(args.input)), encoding="utf-8")
