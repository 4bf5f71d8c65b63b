"""What `kvcompress doctor MODEL` says of a tiny model of every family, as docs/capabilities.md.

python tools/capabilities.py [--markdown FILE]
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kvcompress.runtime.check.probe import Capabilities, probe  # noqa: E402
from tests.runtime.models import FAMILIES, REFUSED, build, refused  # noqa: E402


def page(served: dict[str, Capabilities], not_served: dict[str, Capabilities]) -> str:
    names = [finding.capability for finding in next(iter(served.values())).findings]
    lines = [
        "# What the cache can do, family by family",
        "",
        "Made by `make test-parity` from what `kvcompress doctor MODEL` says of tiny models with "
        f"random weights (transformers {version('transformers')}). Every *yes* and *limit* was run "
        "and its logits compared, budgets, tensor parallel and the profile's last column aside, "
        "which follow from the layers. [families.md](families.md) has the errors of every way of "
        "calling.",
        "",
        "| family | layers | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    notes: dict[str, list[str]] = {}
    for family, found in served.items():
        row = {f.capability: f for f in found.findings}
        cells = [row[name].status for name in names]
        lines.append(f"| {family} | {found.layers} | " + " | ".join(cells) + " |")
        for f in found.findings:
            if f.status != "yes":
                notes.setdefault(f"{f.capability}: {f.status}, {f.note}", []).append(family)
    lines += ["", *(f"- {note} ({', '.join(families)})" for note, families in notes.items())]
    lines += ["", "## Refused", ""]
    lines += [f"- **{family}**: {found.refused}" for family, found in not_served.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    served, not_served = {}, {}
    for family in FAMILIES:
        print(family, file=sys.stderr)
        served[family] = probe(build(family), family)
    for family in REFUSED:
        print(family, file=sys.stderr)
        not_served[family] = probe(refused(family), family)
    text = page(served, not_served)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    wrong = [name for name, found in served.items() if not found.supported]
    wrong += [name for name, found in not_served.items() if found.supported]
    if wrong:
        print(f"not as expected: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
