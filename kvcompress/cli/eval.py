"""`kvcompress eval`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.common import DeviceOption, DtypeOption, JsonOption, emit, refuse_unread
from kvcompress.cli.progress import progress
from kvcompress.strict import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.checkpoint.compute import Dtype
    from kvcompress.evaluate.compare import Row

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Row]]

_DRAWN = ("samples", "context", "windows", "text", "seed")  # what tasks and workloads are drawn by
_OF_THE_HARNESS = ("limit", "task_dir")


def command(
    arguments: typer.Context,
    model: Annotated[str, typer.Argument(help="Bundle, model directory or a name on the Hub.")],
    plan: Annotated[
        Path | None,
        typer.Option(help="plan.json, profile or bundle whose plan to measure on the model."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Of recall, multi_key, hops and count, with commas between.")
    ] = "recall,multi_key",
    workloads: Annotated[
        str,
        typer.Option(
            help="In place of the tasks: all, or of hidden, second_turn, long_span, beyond, "
            "long_generation and instructions, or for real models of facts, facts_visible, "
            "multi_key, passkey, symbols, next_turn, verbatim, arithmetic, own_text, prose, code "
            "and chat, with commas between; real takes all of the latter."
        ),
    ] = "",
    harness: Annotated[
        str,
        typer.Option(
            help="In place of the tasks: tasks of lm-evaluation-harness, with commas between; "
            "needs kvcompress[eval]."
        ),
    ] = "",
    task_dir: Annotated[
        Path | None, typer.Option(help="Folder of harness task files (YAML) of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples per harness task; all by default.")
    ] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of each document.")] = 960,
    samples: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 24,
    windows: Annotated[
        int, typer.Option(min=0, help="Text windows for KL and perplexity; 0 for none.")
    ] = 8,
    text: Annotated[
        Path | None,
        typer.Option(help="Held-out text; by default the demo model's, or what Python carries."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Rows evaluated together.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Measure recall, KL, perplexity and bytes beside the same model with its full cache.

    Example: `kvcompress eval bundle --samples 48 --context 900`, or `kvcompress eval bundle
    --workloads hidden,second_turn`
    """
    if harness:
        refuse_unread(arguments, "with --harness", "tasks", "workloads", *_DRAWN)
    elif workloads:
        refuse_unread(arguments, "with --workloads", "tasks", *_OF_THE_HARNESS)
    else:
        refuse_unread(arguments, "without --harness", *_OF_THE_HARNESS)
        if not _words(tasks) and not windows:
            raise typer.BadParameter("nothing to measure: give --tasks, or --windows above 0")
    with progress(f"loading {model}"):
        loaded, tokenizer, rows = _load(model, plan, device, dtype)
    drawn: dict[str, Json] = {
        "samples": samples,
        "context_tokens": context,
        "windows": windows,
        "text": text,
        "seed": seed,
    }
    if harness:
        _run_harness(loaded, tokenizer, rows, _words(harness), batch, json_, limit, task_dir)
    elif workloads:
        _run_workloads(loaded, tokenizer, rows, _words(workloads), batch, json_, drawn)
    else:
        _run_tasks(loaded, tokenizer, rows, _words(tasks), batch, json_, drawn)


def _run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    tasks: list[str],
    batch: int,
    json_: bool,
    drawn: dict[str, Json],
) -> None:
    from dataclasses import replace

    from kvcompress.evaluate.compare import compare
    from kvcompress.evaluate.suite import make_suite
    from kvcompress.evaluate.table import breakdown, comparison
    from kvcompress.tasks.documents import HELD_OUT

    with progress("drawing questions"):
        given = {**drawn, "text": drawn["text"] or HELD_OUT}
        suite = replace(make_suite(tokenizer, tasks=tasks, **given), batch_rows=batch)
    with progress("evaluating", 1 + len(rows)) as finished:
        reports = list(compare(model, tokenizer, suite, rows, finished))
    emit(reports if json_ else comparison(reports), json_)
    if not json_ and suite.samples:
        emit(breakdown(reports), json_)


def _run_workloads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    names: list[str],
    batch: int,
    json_: bool,
    drawn: dict[str, Json],
) -> None:
    from kvcompress.evaluate.drawing import Sizes
    from kvcompress.evaluate.real import REAL
    from kvcompress.evaluate.serving import model_shape
    from kvcompress.evaluate.workloads import WORKLOADS, make_workloads
    from kvcompress.evaluate.workloads_run import own_continuation
    from kvcompress.evaluate.workloads_table import compare_workloads, workload_table

    groups = {"all": list(WORKLOADS), "real": list(REAL)}
    names = [name for each in names for name in groups.get(each, [each])]
    go_on = partial(own_continuation, model)
    measures = {name: drawn.pop(name) for name in ("context_tokens", "windows")}
    sizes = Sizes(max_position=model_shape(model).max_position, **measures)
    with progress("drawing questions"):
        suites = make_workloads(tokenizer, sizes, names=names, go_on=go_on, **drawn)
    with progress("evaluating", len(suites) * (1 + len(rows))) as finished:
        found = list(compare_workloads(model, tokenizer, suites, rows, finished, batch))
    emit(found if json_ else workload_table(found), json_)


def _run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    tasks: list[str],
    batch: int,
    json_: bool,
    limit: int | None,
    task_dir: Path | None,
) -> None:
    from kvcompress.evaluate.harness import harness_table, run_harness

    if len(rows) != 1:
        raise ValueError(
            f"--harness compares one plan with the full cache, there are {len(rows)}: give a "
            "bundle, or a model directory and --plan"
        )
    (row,) = rows
    with progress(f"running {', '.join(tasks)}"):
        scores = run_harness(
            model,
            tokenizer,
            row.plan,
            row.params,
            tasks,
            limit=limit,
            task_dir=task_dir,
            batch_rows=batch,
        )
    emit(scores if json_ else harness_table(scores), json_)


def _words(listed: str) -> list[str]:
    return [word.strip() for word in listed.split(",") if word.strip()]


def _load(model: str, plan: Path | None, device: str, dtype: Dtype) -> Loaded:
    """The model, its tokenizer, and the plans to measure: a bundle brings its own."""
    from kvcompress.bundle.load import load, serve
    from kvcompress.bundle.manifest import is_bundle
    from kvcompress.evaluate.compare import Row, plan_row
    from kvcompress.profile.source import load_source
    from kvcompress.runtime.model.attached import attached

    rows = [] if plan is None else [plan_row(plan)]
    if not is_bundle(model):
        loaded, tokenizer = load_source(model, device, dtype)
        serve(loaded)
        return loaded, tokenizer, rows
    loaded, tokenizer = load(model, device_map=device, dtype=dtype)
    served = attached(loaded)
    assert served is not None
    return loaded, tokenizer, [Row(Path(model).name, *served), *rows]
