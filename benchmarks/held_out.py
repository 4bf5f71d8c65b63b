"""What plans of a real model cost on text and questions that calibration did not see.

    python benchmarks/held_out.py --model DIR                       # results/held_out/*.json
    python benchmarks/held_out.py --model DIR --calibrated prose    # on plain prose alone
    python benchmarks/held_out.py --page                            # docs/held-out.md

For each calibration a profile is taken and plans of three sizes are run: KL on held-out prose and
code beside the predicted one, and answers to questions about what stands far above. `--workloads
answers` has the model answer short questions at length. Stopped, the same command goes on; profiles
lie under runs/held_out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from studies import RESULTS, ROOT, Record, shown, stated

from kvcompress.atomic import write_file
from kvcompress.cli.progress import progress
from kvcompress.evaluate.drawing import Sizes, WorkloadSuite
from kvcompress.evaluate.serving import cache_bytes, serving, wider_bytes
from kvcompress.evaluate.session import Session
from kvcompress.evaluate.workloads import KNOWN, make_workloads
from kvcompress.evaluate.workloads_run import reference_logits, run_workload
from kvcompress.evaluate.workloads_table import RANKED_FROM
from kvcompress.measure import machine
from kvcompress.measure.cells import Book, load_json
from kvcompress.measure.stats import interval
from kvcompress.measure.tables import markdown
from kvcompress.plan import HeadPlan, Plan, uniform
from kvcompress.profile.run import run
from kvcompress.profile.solve import solve
from kvcompress.profile.source import load_source, weights_hash
from kvcompress.profile.store import Profile
from kvcompress.recipe import BytesPolicy, Calibration, Recipe
from kvcompress.runtime.model.chat import conversation_text, has_template
from kvcompress.runtime.model.families import shape_of
from kvcompress.tasks.stdlib_text import code, prose

FOLDER: Final = RESULTS / "held_out"
PAGE: Final = ROOT / "docs" / "held-out.md"
RUNS: Final = ROOT / "runs" / "held_out"
PARTS: Final = 100  # of a profile, on its bar
POINTS: Final = (4, 8, 16)  # 1/4, 1/8, 1/16 of the 16-bit bytes
CALIBRATIONS: Final = {
    "builtin": "our own prompts, the default",
    "builtin, int8 and int4": "the same, planned among these two codes alone",
    "half prose": "prose as one's own text: half of the prompts, the others ask (`-d FILE`)",
    "prose": "plain prose alone (`--mix FILE=1`)",
    "code": "source code alone (`--mix FILE=1`)",
}
STEPS: Final = (("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
QUESTIONS: Final = (
    "Explain how a bicycle stays upright while it moves.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List ten tips for learning a new language and explain each of them.",
    "My name is Ada and I live in Turin. Plan a week in the city for me and my sister Rosa.",
    "Write a Python class for a bank account, with tests.",
    "What should a small company do before it moves to another office?",
)
ANSWER_TOKENS: Final = 320
ANSWER_CONTEXT: Final = 1024  # the plans'
_HEAD: Final = """\
# Held-out text and questions, by calibration

What plans of real models cost on text and questions that calibration did not see, beside what their
profiles predicted. This page is made by `benchmarks/held_out.py`; no number on it is typed by hand.

KL is to the full cache, in nats per token: a text is read, its cache is compressed, and the next
tokens are fed. *Predicted* is what the profile says of text, *where it asks* what it says of
questions about what stands far above. *Symbols* asks for constants of real source code, *facts* for
facts in real prose, both after compression; nats are −log p of a token of the true answer.

Rows of `builtin` with 16 prompts are planned among all pairs of codes. All others, and the answers,
are planned among int8 and int4 alone, as plans were before there were rotated codes.
"""
_ANSWERS: Final = f"""\
{len(QUESTIONS)} questions of 30 to 60 tokens. Their answers, {ANSWER_TOKENS} tokens each that the \
model draws with its full cache, are
fed token by token. Plans are for {ANSWER_CONTEXT} tokens. *Bytes held* are those at the end of an \
answer, as a share of 16 bits;
*last quarter* is the KL over the answers' last 80 tokens. `from_context` and `ratio` are the two \
settings of `budgets`
([recipes.md](recipes.md)).
"""


def calibration_of(name: str, prompts: int, tokens: int, folder: Path) -> Calibration:
    """Where a profile's prompts come from; texts are of the split that calibration may read."""
    if name.startswith("builtin"):
        return Calibration(prompts=prompts, tokens=tokens)
    kind = name.removeprefix("half ")
    file = folder / f"{kind}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, {"prose": prose, "code": code}[kind]("calibration"))
    shares = {"recall": 0.5, str(file): 0.5} if name.startswith("half") else {str(file): 1.0}
    return Calibration(prompts=prompts, tokens=tokens, mix=shares)


def recipe_of(name: str) -> Recipe:
    """What is profiled and planned, but for the prompts."""
    recipe = Recipe.load(ROOT / "recipes" / "quarter.yaml")
    if not name.endswith("int4"):
        return recipe
    policy = recipe.policy.model_copy(update={"dtypes": STEPS})
    return recipe.model_copy(update={"policy": policy})


def measure(arguments: argparse.Namespace, directory: str) -> None:
    """Every cell of one model, into results/held_out/NAME.json."""
    name = Path(directory).resolve().name
    model, tokenizer = load_source(directory, arguments.device, dtype="float32")
    said = stated(
        model_file=weights_hash(model)[:16],
        processor=machine.cpu_words(),
        dtype="float32; bytes are those of 16 bits",
        calibration=f"prompts of {arguments.tokens} tokens",
        samples=arguments.samples,
        windows=arguments.windows,
    )
    book = Book(arguments.results / f"{name}.json", {**said, "model": name})
    sizes = Sizes(
        arguments.context,
        shape_of(model.config, model.dtype).max_position,
        windows=arguments.windows,
    )

    @cache
    def suite(workload: str) -> tuple[WorkloadSuite, torch.Tensor | None]:
        (drawn,) = make_workloads(tokenizer, sizes, names=(workload,), samples=arguments.samples)
        return drawn, reference_logits(model, tokenizer, drawn)

    @cache
    def profile(calibrated: str) -> tuple[Profile, Any]:
        place = arguments.runs / name
        source = calibration_of(calibrated, arguments.prompts, arguments.tokens, place)
        recipe = recipe_of(calibrated).model_copy(update={"calibration": source})
        words = calibrated.replace(",", "").replace(" ", "-")
        where = place / f"{words}-{arguments.prompts}x{arguments.tokens}"
        with progress(f"{name}: profile on {calibrated}", PARTS) as told:
            steps = lambda done, total: told(PARTS * done // total)  # noqa: E731
            found = run(model, tokenizer, recipe, where, steps)
        return found, found.load_params(where)

    def cell(workload: str, calibrated: str | None, point: int) -> Record:
        drawn, logits = suite(workload)
        plan = params = None
        if calibrated is not None:
            known, params = profile(calibrated)
            asked = {"keep_ratio": 1 / point, "context": arguments.context}
            plan = solve(known, known.recipe.policy.model_copy(update=asked))
        done = run_workload(model, tokenizer, drawn, plan, params, reference=logits)
        return {
            "kv_bytes": done.kv_bytes,
            "kv_bytes_bf16": done.kv_bytes_bf16,
            "predicted": None if plan is None else plan.predicted_loss,
            "predicted_recall": None if plan is None else plan.predicted_recall_loss,
            "kl_nats": None if done.kl_nats is None else [round(x, 6) for x in done.kl_nats],
            "hits": "".join(str(int(hit == 1)) for hit in done.hits) if drawn.samples else None,
            "answer_nats": [round(x, 4) for x in done.answer_nats or ()],
        }

    for workload in arguments.workloads:
        if workload == "answers":
            answers_of_all(book, model, tokenizer, arguments, profile)
            continue
        if not KNOWN[workload].text:
            book.get(f"{workload}|{arguments.context}|full|0|1", partial(cell, workload, None, 1))
        for calibrated in arguments.calibrated:
            for point in POINTS:
                made = f"{calibrated}|{arguments.prompts}"
                key = f"{workload}|{arguments.context}|{made}|{point}"
                book.get(key, partial(cell, workload, calibrated, point))


# ---- short questions, long answers
Spoken = tuple[list[int], torch.Tensor, torch.Tensor]  # prompt, answer [1, T], log p [T, V]


def answer(model: Any, tokenizer: Any, question: str) -> Spoken:
    """What the model says with its full cache, and the log-probabilities that it draws from."""
    asked = question
    if has_template(tokenizer):
        asked = conversation_text(tokenizer, [{"role": "user", "content": question}], True)
    prompt = tokenizer(asked, add_special_tokens=False).input_ids
    torch.manual_seed(0)
    with serving(model, None, None) as new_cache, torch.inference_mode():
        session = Session(model, new_cache(), pad_id=0)
        rows, drawn = [session.prefill([prompt])], []
        for _ in range(ANSWER_TOKENS):
            drawn.append(torch.multinomial((rows[-1] / 0.7).softmax(-1), 1))
            rows.append(session.feed(drawn[-1])[:, -1])
    return prompt, torch.cat(drawn, 1), torch.cat(rows[:-1]).log_softmax(-1)


def answers_of_all(
    book: Book,
    model: Any,
    tokenizer: Any,
    arguments: argparse.Namespace,
    profile: Callable[[str], tuple[Profile, Any]],
) -> None:
    """Every cell of the workload `answers`."""
    spoken = [answer(model, tokenizer, question) for question in QUESTIONS]
    for calibrated in arguments.calibrated:
        known, params = profile(calibrated)
        for budgets, point, plan in answer_plans(known):
            key = f"answers|{budgets}|{calibrated}|{arguments.prompts}|{point}"
            book.get(key, partial(answers, model, plan, params, spoken))


def answer_plans(known: Profile) -> Iterator[tuple[str, int, Plan]]:
    """(`budgets`, one part of the bytes in so many, plan)."""
    yield "int8", 2, uniform(known.shape, HeadPlan(full=True))
    for budgets in ("from_context", "ratio"):
        for point in POINTS:
            policy = BytesPolicy(kind="bytes", keep_ratio=1 / point, context=ANSWER_CONTEXT)
            yield budgets, point, solve(known, policy.model_copy(update={"budgets": budgets}))


def answers(model: Any, plan: Plan, params: Any, spoken: Sequence[Spoken]) -> Record:
    """KL over the answers, fed to a compressed cache, and the bytes that it then holds."""
    kl, last, held, full = [], [], [], []
    with serving(model, plan, params) as new_cache, torch.inference_mode():
        for prompt, said, wanted in spoken:
            session = Session(model, new_cache(), pad_id=0)
            rows = [session.prefill([prompt])]
            rows += [session.feed(said[:, i : i + 1])[:, -1] for i in range(ANSWER_TOKENS - 1)]
            found = torch.cat(rows).log_softmax(-1)
            nats = (wanted.exp() * (wanted - found)).sum(-1)
            kl.append(round(float(nats.mean()), 6))
            last.append(round(float(nats[-ANSWER_TOKENS // 4 :].mean()), 6))
            tokens = len(prompt) + ANSWER_TOKENS - 1
            held.append(cache_bytes(session.cache) - wider_bytes(model, plan, tokens))
            full.append(plan.model.bf16_kv_bytes(tokens, 1))
    return {"kl_nats": kl, "last_nats": last, "kv_bytes": sum(held), "kv_bytes_bf16": sum(full)}


# ---- page
def page(results: Sequence[Path]) -> str:
    lines = [_HEAD]
    for path in results:
        content: Any = load_json(path.read_text(encoding="utf-8"))
        lines += [f"## {content['conditions']['model']}", ""]
        every = [tuple(key.split("|")) for key in content["cells"]]
        keys = [key for key in every if key[0] != "answers"]
        for context in sorted({key[1] for key in keys}, key=int):
            cells = {k[:1] + k[2:]: content["cells"]["|".join(k)] for k in keys if k[1] == context}
            lines += [f"### {context} tokens", "", *_texts(cells), *_questions(cells)]
        said = {k[1:]: content["cells"]["|".join(k)] for k in every if k[0] == "answers"}
        lines += _answered(said)
        told = ", ".join(f"{name}: {value}" for name, value in content["conditions"].items())
        lines += [f"Conditions: {told}.", ""]
    names = [f"- **{name}**: {words}" for name, words in CALIBRATIONS.items()]
    return "\n".join([*lines, "## Calibrations", "", *names, ""])


def _texts(cells: Record) -> list[str]:
    texts = [name for name in ("prose", "code") if any(key[0] == name for key in cells)]
    rows = []
    for *made, point in _made(cells, texts):
        here = [cells.get((name, *made, point)) for name in texts]
        known = [each for each in here if each is not None]
        text, asking = known[0]["predicted"], known[0]["predicted_recall"]
        told = [f"{text:.4f}", "" if asking is None else f"{asking:.4f}"]
        found = [None if each is None else interval(each["kl_nats"]) for each in here]
        told += ["" if each is None else shown(each, 1, 4) for each in found]
        ratio = ", ".join(f"{text / each[0]:.2f}" for each in found if each is not None)
        rows.append([*made, f"1/{point}", *told, ratio])
    if not rows:
        return []
    heads = ["calibration", "prompts", "bytes", "predicted", "where it asks"]
    heads += [*(f"KL, {name}" for name in texts), "predicted / measured"]
    return [markdown(heads, rows, numbers_from=1, tight=True), ""]


def _answered(cells: Record) -> list[str]:
    rows = [
        [
            "int8, every token" if key[0] == "int8" else f"`{key[0]}`",
            "" if key[0] == "int8" else f"1/{key[3]}",
            f"{cell['kv_bytes'] / cell['kv_bytes_bf16']:.3f}",
            shown(interval(cell["kl_nats"]), 1, 4),
            f"{fmean(cell['last_nats']):.4f}",
        ]
        for key, cell in cells.items()
    ]
    if not rows:
        return []
    heads = ["budgets", "plan", "bytes held", "KL", "last quarter"]
    table = markdown(heads, rows, numbers_from=1, tight=True)
    return ["### Short questions, long answers", "", _ANSWERS, table, ""]


def _made(cells: Record, workloads: Sequence[str]) -> list[tuple[str, str, str]]:
    """(calibration, prompts, point) of the cells of these workloads, in the order of the page."""
    names = ["full", *CALIBRATIONS]
    found = {key[1:] for key in cells if key[0] in workloads}
    return sorted(found, key=lambda key: (names.index(key[0]), int(key[1]), int(key[2])))


def _questions(cells: Record) -> list[str]:
    asked = [name for name in ("symbols", "facts") if any(key[0] == name for key in cells)]
    rows = []
    for calibrated, prompts, point in _made(cells, asked):
        row = [calibrated, *(["", ""] if calibrated == "full" else [prompts, f"1/{point}"])]
        for name in asked:
            each = cells.get((name, calibrated, prompts, point))
            hits = [] if each is None else [int(hit) for hit in each["hits"]]
            row += [f"{100 * fmean(hits):.0f} %" if hits else ""]
            row += ["" if each is None else shown(interval(each["answer_nats"]), 1, 3)]
        rows.append(row)
    if not rows:
        return []
    heads = ["calibration", "prompts", "bytes"]
    for name in asked:
        whole = cells.get((name, "full", "0", "1"))
        low = whole is not None and fmean(int(hit) for hit in whole["hits"]) < RANKED_FROM
        heads += [f"{name} right" + (", not ranked" if low else ""), f"{name}, nats"]
    return [markdown(heads, rows, numbers_from=1, tight=True), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", default=[], help="directory; several times")
    parser.add_argument("--calibrated", action="append", choices=CALIBRATIONS, default=[])
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=["prose", "code"])
    parser.add_argument("--context", type=int, default=2048, help="tokens before the scored ones")
    parser.add_argument("--prompts", type=int, default=16, help="of a calibration")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--samples", type=int, default=24, help="questions")
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the profiles")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    arguments = parser.parse_args()
    arguments.calibrated = arguments.calibrated or ["builtin"]
    for directory in [] if arguments.page else arguments.model:
        measure(arguments, directory)
    write_file(PAGE, page(sorted(arguments.results.glob("*.json"))))
    print(f"page written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
