"""lm-evaluation-harness on a compressed cache, beside the same model with its full cache.

Every score goes through the cache, see `harness_model`. What a task can tell is limited: the
question stands in the prompt while that is compressed, and a context that is no longer than what a
plan keeps anyway (sinks, newest tokens, budgets) loses nothing. `workloads` has neither limit.
Source of the harness: https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.errors import KVCompressError
from kvcompress.evaluate.serving import serving
from kvcompress.measure.stats import Interval, paired
from kvcompress.measure.tables import terminal
from kvcompress.plan import Plan, StrictModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.quant.keystats import KVParams

_RESAMPLES = 1000  # of the harness, for standard errors that have no closed form


class HarnessScore(StrictModel):
    """One metric of one task.

    Attributes:
        metric: as the harness names it, with its filter where that is not ``none``.
        value, standard_error: with the plan, from the harness; None where it gives none.
        reference, reference_standard_error: with the full cache.
        difference_interval: 95 % bootstrap interval of value minus reference, paired per sample;
            None where the metric is not a mean over samples.
    """

    task: str
    metric: str
    samples: int
    higher_is_better: bool | None
    value: float
    standard_error: float | None
    reference: float
    reference_standard_error: float | None
    difference_interval: Interval | None

    @property
    def difference(self) -> float:
        return self.value - self.reference


def evaluate_harness(
    bundle: Path | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    task_dir: Path | str | None = None,
    num_fewshot: int | None = None,
    batch_rows: int = 8,
    device: str | None = None,
) -> tuple[HarnessScore, ...]:
    """Scores of a bundle on tasks of the harness; arguments as for `run_harness`.

    Args:
        device: where the bundle is loaded; None is the CPU.

    Raises:
        KVCompressError: as `run_harness`, and where the bundle is damaged.
    """
    _need_harness()
    from kvcompress.bundle.load import load
    from kvcompress.runtime.model.attached import attached

    model, tokenizer = load(bundle, device_map=device)
    served = attached(model)
    assert served is not None
    return run_harness(
        model,
        tokenizer,
        *served,
        tasks,
        limit=limit,
        task_dir=task_dir,
        num_fewshot=num_fewshot,
        batch_rows=batch_rows,
    )


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    params: KVParams | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    task_dir: Path | str | None = None,
    num_fewshot: int | None = None,
    batch_rows: int = 8,
) -> tuple[HarnessScore, ...]:
    """Scores with the plan beside those with the full cache.

    Args:
        tasks: names of tasks, tags or groups of the harness, or of `task_dir`.
        limit: samples per task; None takes all.
        task_dir: folder of task files (YAML) of your own.
        num_fewshot: examples in front of each question; None is what the task says.
        batch_rows: rows evaluated together.

    Raises:
        KVCompressError: where lm-eval is not installed, or there is no such task.
        PlanError: for a plan that was made for another model.
    """
    _need_harness()
    from lm_eval import simple_evaluate

    manager = _manager(tasks, task_dir)
    settings = {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "task_manager": manager,
        "bootstrap_iters": _RESAMPLES,
        # the harness would seed the whole program; it draws its examples by a seed of its own
        "random_seed": None,
        "numpy_random_seed": None,
        "torch_random_seed": None,
    }
    found = []
    for one in (None, plan):
        with serving(model, one, params) as new_cache:
            lm = _cached_lm(model, tokenizer, new_cache, batch_rows)
            found.append(simple_evaluate(lm, **settings))
    reference, ours = found
    return tuple(_scores(ours, reference))


def harness_table(scores: Sequence[HarnessScore]) -> Table:
    """One line per metric."""
    rows: list[dict[str, str | None]] = []
    for score in scores:
        difference = f"{score.difference:+.4g}"
        if score.difference_interval is not None:
            difference += " ({:+.3g}…{:+.3g})".format(*score.difference_interval)
        rows.append(
            {
                "task": score.task,
                "metric": score.metric,
                "samples": str(score.samples),
                "full cache": _with_error(score.reference, score.reference_standard_error),
                "with the plan": _with_error(score.value, score.standard_error),
                "difference": difference,
            }
        )
    note = "±: standard error; difference with its 95 % interval, paired per sample."
    return terminal(rows, caption=note, words=2)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise KVCompressError(
            f"tasks of lm-evaluation-harness need lm-eval ({error}): pip install 'kvcompress[eval]'"
        ) from None


def _manager(tasks: Sequence[str], task_dir: Path | str | None) -> Any:
    """The harness's index of tasks; reading its own few thousand files takes seconds."""
    from lm_eval.tasks import TaskManager

    if task_dir is not None and not Path(task_dir).is_dir():
        raise KVCompressError(f"{task_dir}: no such folder; give one with task files (YAML)")
    manager = None
    if task_dir is not None:
        manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        include = None if task_dir is None else str(task_dir)
        manager = TaskManager(include_path=include)
    missing = sorted(set(tasks) - set(manager.all_tasks))
    if missing or not tasks:
        where = "" if task_dir is None else f" or in {task_dir}"
        raise KVCompressError(
            f"no task {', '.join(missing) or 'is named'} in lm-evaluation-harness{where}: "
            "lm-eval ls tasks lists its own"
        )
    return manager


def _cached_lm(*arguments: Any) -> Any:
    """A `CachedLM`; HFLM warns of every model that is given to it loaded."""
    with _quiet("lm_eval"):
        from kvcompress.evaluate.harness_model import CachedLM

        return CachedLM(*arguments)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(ours: dict[str, Any], reference: dict[str, Any]) -> Iterator[HarnessScore]:
    """One per task and metric, in the harness's order."""
    for task, values in ours["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error_key = f"{metric}_stderr,{chosen}"
            other = reference["results"][task]
            yield HarnessScore(
                task=task,
                metric=metric if chosen == "none" else f"{metric},{chosen}",
                samples=ours["n-samples"].get(task, {}).get("effective", 0),
                higher_is_better=ours["higher_is_better"].get(task, {}).get(metric),
                value=float(value),
                standard_error=_number(values.get(error_key)),
                reference=float(other[key]),
                reference_standard_error=_number(other.get(error_key)),
                difference_interval=_paired_interval(ours, reference, task, metric, chosen, value),
            )


def _paired_interval(
    ours: dict[str, Any], reference: dict[str, Any], task: str, metric: str, chosen: str, value: Any
) -> Interval | None:
    """Where the metric is the mean of what each sample scored."""
    mine, theirs = (_per_sample(found, task, metric, chosen) for found in (ours, reference))
    if not mine or set(mine) != set(theirs):
        return None
    if abs(sum(mine.values()) / len(mine) - value) > 1e-9:
        return None
    pairs = [(mine[document], theirs[document]) for document in sorted(mine)]
    return paired([a for a, _ in pairs], [b for _, b in pairs])[1]


def _per_sample(found: dict[str, Any], task: str, metric: str, chosen: str) -> dict[int, float]:
    """Score of each document, by its number; empty unless all of them are numbers."""
    rows = [row for row in found["samples"].get(task, ()) if row["filter"] == chosen]
    scores = {row["doc_id"]: _number(row.get(metric)) for row in rows}
    numbers = {document: score for document, score in scores.items() if score is not None}
    return numbers if len(numbers) == len(scores) else {}


def _number(value: Any) -> float | None:
    """`value` as a float where it is one number; the harness writes N/A for what it lacks."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
