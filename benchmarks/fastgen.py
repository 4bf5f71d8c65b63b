"""FastGen decided once for a model, and anew for every request, side by side.

    python benchmarks/fastgen.py             # table, benchmarks/results/fastgen.json, figure

On the shipped model, at several recovery targets: bytes, recall, KL on text, the keep-sets that the
heads got, and what it costs to decide at the end of a prompt. The static plan is solved from a
profile on the built-in calibration prompts, whose last rows are questions; per request the last 64
rows of the prompt itself decide. See docs/fastgen.md.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from pages.plots import pyplot
from studies import (
    CONTEXT,
    FIGURES,
    RESULTS,
    attached,
    conditions,
    gap,
    parser_of,
    percent,
    quality,
    setting,
    summary,
    taking_turns,
)

import kvcompress
from kvcompress.evaluate.quality import measure
from kvcompress.evaluate.serving import serving
from kvcompress.evaluate.suite import Suite
from kvcompress.measure.cells import Book
from kvcompress.plan import FastGenChoice, Plan, uniform
from kvcompress.profile.run import run
from kvcompress.profile.solve import solve
from kvcompress.profile.store import Profile
from kvcompress.recipe import Calibration, FastGenPolicy, Keep, Recipe
from kvcompress.runtime.names import as_argument

TARGETS = (0.8, 0.9, 0.95)  # kept mass; ‖A − Â‖₁ ≤ 1 − T is the mass (1 + T) / 2
KINDS = ("static", "per request")
CHAIN = ("special", "+punct", "+frequent", "+local", "full")
REPEATS = 7


def static_plan(profile: Profile, target: float, reading: str = "mass") -> Plan:
    policy = {"kind": "fastgen", "recovery": target, "reading": reading}
    return solve(profile, FastGenPolicy.model_validate(policy))


def request_plan(profile: Profile, target: float, reading: str = "mass") -> Plan:
    rule = {"kind": "fastgen", "recovery": target, "reading": reading}
    return uniform(
        profile.shape,
        profile.chain[-2],
        scorer=profile.recipe.keep.scorer,
        special_ids=profile.special_ids,
        punct_ids=profile.punct_ids,
        special_share=profile.special_share,
        punct_share=profile.punct_share,
        tokenizer_hash=profile.tokenizer_hash,
        per_request=FastGenChoice.model_validate(rule),
        target=f"FastGen per request, {target:g} by {reading}",
    )


def plan_of(kind: str, profile: Profile, target: float, reading: str = "mass") -> Plan:
    return (static_plan if kind == "static" else request_plan)(profile, target, reading)


def prompts_of(tokenizer: Any, suite: Suite) -> list[list[int]]:
    """The documents of the questions, then the text windows; one request each."""
    documents = dict.fromkeys(sample.context for sample in suite.samples)
    found = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    assert suite.windows is not None
    return found + [window[:CONTEXT].tolist() for window in suite.windows]


@torch.inference_mode()
def requests(
    model: Any, profile: Profile, params: Any, plan: Plan, prompts: list[list[int]]
) -> dict[str, Any]:
    """Per prompt its bytes, and each head's place in the chain, ``places[prompt][layer][head]``."""
    names = [head.label for head in profile.chain]
    sizes, places = [], []
    with serving(model, plan, params) as new_cache:
        for ids in prompts:
            cache: Any = _read(model, new_cache(), torch.tensor([ids]))
            sizes.append(cache.nbytes() / profile.shape.bf16_kv_bytes(len(ids), 1))
            chosen = [layer[0] for layer in cache.chosen_heads()]
            places.append([[names.index(head.label) for head in layer] for layer in chosen])
    return {"share_of_bf16": [round(size, 5) for size in sizes], "places": places}


@torch.inference_mode()
def cost(model: Any, profile: Profile, params: Any, ids: list[int]) -> dict[str, Any]:
    """CPU time of one prompt in ms, medians of interleaved repeats: the plan that was decided
    before, the same budgets decided at the prompt's end, and what the latter costs on top.

    The static plan is the one in which every head takes the largest keep-set but full, so that both
    collect the same scores and only the decision differs; the target 0 makes no head full.
    """
    request = request_plan(profile, 0.01)
    plans = {
        "decided before": request.model_copy(update={"per_request": None}),
        "decided per request": request,
    }
    tokens = torch.tensor([ids])
    runs = dict.fromkeys(plans, lambda: _read(model, kvcompress.new_cache(model), tokens))
    found = taking_turns(runs, REPEATS, 0, lambda name: attached(model, plans[name], params))
    attached(model, None)
    times = [samples.cpu_ms() for samples in found.values()]
    medians = {name: round(statistics.median(t), 1) for name, t in zip(found, times, strict=True)}
    extra = [b - a for a, b in zip(*times, strict=True)]
    return {"prompt_tokens": len(ids), **medians, "on top": round(statistics.median(extra), 1)}


def _read(model: Any, cache: Any, tokens: torch.Tensor) -> Any:
    model(tokens, **as_argument(cache), use_cache=True, logits_to_keep=1)
    cache.finish_prompt(model)
    return cache


def readings_agree(
    model: Any, profile: Profile, params: Any, prompts: list[list[int]]
) -> dict[str, bool]:
    """Whether ‖A − Â‖₁ ≤ 1 − T chooses what the mass (1 + T) / 2 chooses."""
    found = {}
    for kind in KINDS:
        for target in TARGETS:
            pair = (
                plan_of(kind, profile, target),
                plan_of(kind, profile, 2 * target - 1, "l1"),
            )
            one, two = (requests(model, profile, params, p, prompts)["places"] for p in pair)
            found[f"{kind}, mass {target:g} and L1 {2 * target - 1:g}"] = one == two
    return found


def draw(cells: dict[str, Any]) -> None:
    """Which keep-set each head gets: one panel per target and kind."""
    plt = pyplot(plain=True)
    figure, axes = plt.subplots(2, len(TARGETS), figsize=(8.5, 4.8), layout="constrained")
    for row, kind in enumerate(KINDS):
        for column, target in enumerate(TARGETS):
            places = torch.tensor(cells[f"requests: {kind} {target:g}"]["places"]).float()
            axis = axes[row, column]
            mean = places.mean(0)
            image = axis.imshow(mean, vmin=0, vmax=len(CHAIN) - 1, cmap="viridis")
            for layer in range(mean.shape[0]):
                for head in range(mean.shape[1]):
                    level = float(mean[layer, head])
                    shown = f"{level:.0f}" if kind == "static" else f"{level:.1f}"
                    colour = "black" if level > 2.2 else "white"
                    axis.text(head, layer, shown, ha="center", va="center", color=colour)
            axis.set(title=f"{kind}, T = {target:g}", xlabel="KV head", ylabel="layer")
            axis.set(xticks=range(mean.shape[1]), yticks=range(mean.shape[0]))
    bar = figure.colorbar(image, ax=axes, ticks=range(len(CHAIN)))
    bar.ax.set_yticklabels([f"{i} {name}" for i, name in enumerate(CHAIN)])
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "fastgen.png", dpi=110)


def table(cells: dict[str, Any]) -> str:
    """Markdown: one row per target and kind."""
    lines = [
        "| T by mass | T by L1 | decided | bytes of bf16 (least to most) | heads per keep-set | "
        "hidden | visible | nats per answer token | KL on text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    full = cells["full cache"]
    for target in TARGETS:
        before = cells[f"static {target:g}"]
        for kind in KINDS:
            cell, seen = cells[f"{kind} {target:g}"], cells[f"requests: {kind} {target:g}"]
            sizes = seen["share_of_bf16"]
            flat = torch.tensor(seen["places"]).flatten()
            shares = torch.bincount(flat, minlength=len(CHAIN)) / len(flat)
            chosen = " / ".join(f"{100 * float(share):.0f}" for share in shares)
            lines.append(
                f"| {target:g} | {2 * target - 1:.2g} | {kind} | {statistics.mean(sizes):.3f} "
                f"({min(sizes):.3f} to {max(sizes):.3f}) | {chosen} % | "
                f"{percent(cell, 'hidden')} | {percent(cell, 'visible')} | "
                f"{summary(cell, 'answer_nats')[0]:.2f} | {summary(cell, 'kl_nats')[0]:.4f} |"
            )
        asked = cells[f"per request {target:g}"]
        gaps = [gap(asked, before, name, 100) for name in ("hidden", "visible")]
        nats, kl = (gap(asked, before, name, digits=3) for name in ("answer_nats", "kl_nats"))
        lines.append(f"| | | difference | | | {' | '.join(gaps)} | {nats} | {kl} |")
    lines.append(
        f"| 1 | 1 | full cache | 1 | | {percent(full, 'hidden')} | {percent(full, 'visible')} | "
        f"{summary(full, 'answer_nats')[0]:.2f} | 0 |"
    )
    return "\n".join(lines)


def main() -> None:
    arguments = parser_of(__doc__, RESULTS / "fastgen.json", 96).parse_args()
    model, tokenizer, suite = setting(arguments.samples)
    recipe = Recipe(
        calibration=Calibration(prompts=12, tokens=CONTEXT),
        keep=Keep(score_rows=None),
        policy=FastGenPolicy(kind="fastgen"),
    )
    with tempfile.TemporaryDirectory() as folder:
        profile = run(
            model, tokenizer, recipe, Path(folder) / "profile", also=["losses", "recovery"]
        )
        params = profile.load_params(Path(folder) / "profile")
    stated = conditions(arguments.samples) | {"recipe": recipe.model_dump(mode="json")}
    done = Book(arguments.json, stated)
    prompts = prompts_of(tokenizer, suite)
    for kind in KINDS:
        for target in TARGETS:
            plan = plan_of(kind, profile, target)
            done.get(
                f"requests: {kind} {target:g}",
                lambda plan=plan: requests(model, profile, params, plan, prompts),
            )
    done.get("cost in CPU ms", lambda: cost(model, profile, params, prompts[0]))
    done.get(
        "readings agree", lambda: readings_agree(model, profile, params, prompts[:2] + prompts[-2:])
    )
    draw(done.cells)
    full = measure(model, tokenizer, suite)
    done.get("full cache", lambda: quality(model, tokenizer, suite, None, None, full))
    for target in TARGETS:
        for kind in KINDS:
            plan = plan_of(kind, profile, target)
            done.get(
                f"{kind} {target:g}",
                lambda plan=plan: quality(model, tokenizer, suite, plan, params, full),
            )
    print(table(done.cells))
    print(done.cells["cost in CPU ms"], done.cells["readings agree"])


if __name__ == "__main__":
    main()
