"""The main job on the shipped model: profile, plan, export, load, generate, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvcompress.atomic import write_file
from kvcompress.demo.plans import RIVALS, NamedPlan, demo_plans, demo_recipe, rivals
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.report import QualityReport
from kvcompress.plan import StrictModel
from kvcompress.runtime.names import cache_of
from kvcompress.tasks.documents import HELD_OUT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.evaluate.suite import Suite

MODEL: Final = Path(__file__).parent / "model"
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How much the demo runs.

    Attributes:
        prompts: calibration prompts of the profile.
        tasks: the first gets `samples` questions, each further one a quarter of them.
        windows: text windows for KL and perplexity.
    """

    context_tokens: int = 960
    prompts: int = 8
    tasks: tuple[str, ...] = ("recall", "multi_key")
    samples: int = 36
    windows: int = 8
    continuation_tokens: int = 64
    notes_per_document: int = 12
    max_words: int = 16


FULL: Final = Settings()
QUICK: Final = Settings(tasks=("recall",), samples=12, windows=2)


class Example(StrictModel):
    """One completion of the loaded bundle by `model.generate`."""

    question: str
    answer: str
    expected: str
    kv_bytes: int


class DemoResult(StrictModel):
    """What the demo made and measured; the first report is the reference."""

    profile: str
    bundle: str
    report: str
    example: Example
    reports: tuple[QualityReport, ...]


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows nothing."""
    yield lambda done: None


def run(
    out: Path,
    settings: Settings = FULL,
    *,
    model_dir: Path = MODEL,
    note: Callable[[str], None] = lambda text: None,
    bar: Bar = no_bar,
) -> DemoResult:
    """Everything, into ``profile``, ``bundle`` and ``report.json`` under `out`.

    Args:
        note: told what begins, one line at a time.
        bar: makes a progress bar from a label and a number of steps.

    Raises:
        KVCompressError: if `model_dir` is not there, or one of the steps fails.
    """
    from kvcompress.checkpoint.compute import stored_dtype
    from kvcompress.profile.run import run as take_profile
    from kvcompress.profile.source import load_source
    from kvcompress.runtime.model.families import shape_of

    if not (model_dir / "config.json").is_file():
        raise KVCompressError(f"{model_dir}: no demo model there; install kvcompress again")
    out.mkdir(parents=True, exist_ok=True)
    with bar("loading", 1):
        model, tokenizer = load_source(str(model_dir), "cpu", "auto")
    recipe = demo_recipe(settings.context_tokens, settings.prompts)
    note(f"profiling on {settings.prompts} prompts of {settings.context_tokens} tokens")
    with bar("profile", 100) as percent:
        profile = take_profile(
            model,
            tokenizer,
            recipe,
            out / "profile",
            progress=lambda done, steps: percent(100 * done // steps),
            also=["recovery"],
        )
    shape = shape_of(model.config, stored_dtype(model))
    plans = demo_plans(profile, shape, recipe)
    with bar("exporting", 1):
        _ship(out, model_dir, plans, note)
    with bar("drawing questions", 1):
        suite = demo_suite(tokenizer, settings)

    def more(held_bytes: int) -> list[NamedPlan]:
        return rivals(shape, recipe.keep, held_bytes, settings.context_tokens)

    example, reports = _measure(out / "bundle", model, tokenizer, suite, plans, more, note, bar)
    result = DemoResult(
        profile=str(out / "profile"),
        bundle=str(out / "bundle"),
        report=str(out / "report.json"),
        example=example,
        reports=tuple(reports),
    )
    write_file(out / "report.json", result.model_dump_json(indent=1) + "\n")
    return result


def demo_suite(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Suite:
    """The questions of all tasks and the text windows."""
    from dataclasses import replace

    from kvcompress.evaluate.suite import make_suite

    def of(tasks: tuple[str, ...], samples: int, windows: int) -> Suite:
        return make_suite(
            tokenizer,
            tasks=tasks,
            samples=samples,
            windows=windows,
            context_tokens=settings.context_tokens,
            continuation_tokens=settings.continuation_tokens,
            notes_per_document=settings.notes_per_document,
            max_words=settings.max_words,
            text=HELD_OUT,
        )

    suite = of(settings.tasks[:1], settings.samples, settings.windows)
    further = of(settings.tasks[1:], max(1, settings.samples // 4), 0)
    documents = 1 + max((sample.document for sample in suite.samples), default=-1)
    shifted = (replace(s, document=s.document + documents) for s in further.samples)
    return replace(suite, samples=(*suite.samples, *shifted))


def _ship(out: Path, model_dir: Path, plans: list[NamedPlan], note: Callable[[str], None]) -> None:
    from kvcompress.bundle.write import export

    (shipped,) = (row for row in plans if row.ships)
    note(f"exporting {shipped.name} to {out / 'bundle'}")
    export(model_dir, out / "profile", out / "bundle", plan=shipped.plan, overwrite=True)


def _measure(
    bundle: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    plans: list[NamedPlan],
    more: Callable[[int], list[NamedPlan]],
    note: Callable[[str], None],
    bar: Bar,
) -> tuple[Example, list[QualityReport]]:
    """All of `plans`, then what `more` gives for the bytes that the last of them held."""
    from kvcompress.bundle.load import load, serve
    from kvcompress.evaluate.quality import measure
    from kvcompress.runtime.model.attached import attached

    note("loading the bundle and generating from it")
    with bar("loading the bundle", 1):
        loaded, loaded_tokenizer = load(bundle, dtype="auto")
    served = attached(loaded)
    assert served is not None
    params = served[1]
    serve(model)
    example = complete(loaded, loaded_tokenizer, suite)
    note("measuring recall, KL, perplexity and bytes of every row")
    queue = list(plans)
    with bar("measure", 1 + len(plans) + len(RIVALS)) as finished:
        reference = measure(model, tokenizer, suite, name="reference, full cache")
        reports = [reference.report]
        finished(1)
        while queue:
            row = queue.pop(0)
            outcome = measure(
                loaded if row.ships else model,
                tokenizer,
                suite,
                served[0] if row.ships else row.plan,
                params,
                reference=reference,
                name=f"{row.name} (bundle)" if row.ships else row.name,
            )
            reports.append(outcome.report)
            finished(len(reports))
            if row is plans[-1]:
                queue += more(outcome.report.kv_bytes)
    return example, reports


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite: Suite) -> Example:
    """The first sample answered by plain `model.generate`, with the plan that the bundle brings."""
    from kvcompress.evaluate.serving import cache_bytes, wider_bytes
    from kvcompress.runtime.model.attached import attached

    served = attached(model)
    assert served is not None
    sample = suite.samples[0]
    prompt = tokenizer(sample.context + sample.question, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    answer_tokens = len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
    generated: Any = model.generate(  # type: ignore[operator]
        **prompt, max_new_tokens=answer_tokens, do_sample=False, return_dict_in_generate=True
    )
    answer = tokenizer.decode(generated.sequences[0, length:])
    return Example(
        question=sample.question,
        answer=str(answer),
        expected=sample.answer,
        kv_bytes=cache_bytes(cache_of(generated)) - wider_bytes(model, served[0], length),
    )
