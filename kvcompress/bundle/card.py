"""README.md of a bundle: a model card whose figures come from the bundle itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from kvcompress.accounting import kv_bytes
from kvcompress.plan import Plan

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def model_card(
    base_id: str,
    license_keys: Mapping[str, str],
    plan: Plan,
    weights: str,
    weights_bytes: int,
    base_weights_bytes: int,
    measured: Mapping[str, float],
    capabilities: Sequence[Mapping[str, str]] = (),
) -> str:
    """The text of README.md.

    Args:
        base_weights_bytes: of the base model's weights in bf16.
        measured: figures by name, printed as they are.
        capabilities: rows of `kvcompress.runtime.check.probe.as_rows`.
    """
    head = yaml.safe_dump(
        {
            "base_model": base_id,
            "base_model_relation": "quantized",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["kvcompress", "kv-cache"],
            **license_keys,
        },
        sort_keys=False,
    )
    rows = [("weights", f"{weights}", base_weights_bytes, weights_bytes)]
    for context_tokens in _contexts(plan):
        full = plan.model.bf16_kv_bytes(context_tokens, batch=1)
        held = kv_bytes(plan, context_tokens, batch=1)
        rows.append((f"KV cache at {context_tokens} tokens", _storage(plan), full, held))
    table = "\n".join(
        f"| {name} | {form} | {size(full)} | {size(held)} | {held / full:.3f} |"
        for name, form, full, held in rows
    )
    return f"""---
{head}---
# {base_id.split("/")[-1]}, compressed by kvcompress

`{base_id}` with smaller memories: weights stored as {weights}, and a KV cache that follows a plan
made for this model ({plan.target}).

| | stored as | bf16 | here | ratio |
|---|---|---:|---:|---:|
{table}

Bytes of one sequence, scales and positions included.

{_measured(measured)}{_capabilities(capabilities)}## Use

```python
import kvcompress

model, tokenizer = kvcompress.load("path/to/this/directory")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`transformers.AutoModelForCausalLM.from_pretrained` loads the weights without kvcompress; the KV
cache is then transformers' own, in full. `kvcompress inspect --verify` checks every file of the
directory.
"""


def size(count_bytes: int) -> str:
    """``1536`` as ``1.50 KiB``."""
    value, unit = float(count_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.2f} {_UNITS[unit]}" if unit else f"{count_bytes} B"


def _contexts(plan: Plan) -> tuple[int, ...]:
    longest = plan.max_position
    return tuple(sorted({max(1, longest // 4), longest}))


def _storage(plan: Plan) -> str:
    kinds = {head.storage for layer in plan.heads for head in layer}
    return ", ".join(sorted(kinds))


def _measured(measured: Mapping[str, float]) -> str:
    if not measured:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured.items())
    return f"## Measured\n\n| | |\n|---|---:|\n{rows}\n\n"


def _capabilities(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    lines = "\n".join(
        f"| {r['capability']} | {r['status']} | {r['error']} | {r['note']} |" for r in rows
    )
    return f"""## What the compressed cache can do with this model

Found by running it (`kvcompress doctor`); the error is that of the logits, relative to their norm.

| | | error | |
|---|---|---:|---|
{lines}

"""
