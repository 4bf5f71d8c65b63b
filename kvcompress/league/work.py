"""What one process of the league does: profiles, plans at byte targets, and cells."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from kvcompress.league.cells import (
    Measured,
    cell_key,
    cell_store,
    code_hash,
    file_hash,
    suite_hash,
)
from kvcompress.league.entries import Entry
from kvcompress.league.profiles import Profiles, within
from kvcompress.league.quantized import QuantizedCacheSettings, uncompiled
from kvcompress.league.tune import Bench, Placed, place
from kvcompress.measure.cells import Folder
from kvcompress.plan import ModelShape, Plan
from kvcompress.recipe import Calibration, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.checkpoint.compute import Dtype
    from kvcompress.evaluate.workloads import WorkloadSuite
    from kvcompress.evaluate.workloads_report import WorkloadOutcome
    from kvcompress.quant.keystats import KVParams

WINDOW_TOKENS: Final = 32  # a run of so many tokens that two texts share is no accident
_TUNING: Final = Calibration(prompts=3, seed=1)  # prompts whose bytes are measured while tuning


@dataclass(frozen=True, slots=True)
class Setup:
    """What every process of one league needs to know.

    Attributes:
        given: a finished profile to use where it fits.
        calibration: of the profile that has the constants of every plan.
        sizes: in place of the usual ones of `drawing.Sizes`.
        dtype: to compute in, see `load_source`; bytes stay those of the model's own.
        any_code: accept cells that other code of this package measured.
        finished: take the cells that are there and measure no other.
    """

    model: str
    device: str
    out: Path
    workloads: tuple[str, ...]
    samples: int
    context_tokens: int
    seed: int
    given: Path | None = None
    any_code: bool = False
    finished: bool = False
    calibration: Calibration = Calibration()
    sizes: tuple[tuple[str, Any], ...] = ()
    dtype: Dtype = "auto"


@dataclass(frozen=True, slots=True)
class FactsTask:
    """Say what the conditions of the league are; `recipes` name the calibration data."""

    recipes: tuple[Recipe, ...]
    quantized: tuple[QuantizedCacheSettings, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What only a process with the model knows; see `result.Conditions`.

    Attributes:
        decoded: workloads that decode token by token before they ask, which takes longest.
        refusals: why a cache cannot run here; empty where it can.
    """

    shape: ModelShape
    weights_hash: str
    device: str
    dtype: str
    lengths: dict[str, int]
    decoded: tuple[str, ...]
    shared_windows: int
    refusals: dict[QuantizedCacheSettings, str]


@dataclass(frozen=True, slots=True)
class ProfileTask:
    """Take the profile that `recipe` is solved from."""

    recipe: Recipe


@dataclass(frozen=True, slots=True)
class PlaceTask:
    """Find the plan of an entry at a byte target."""

    entry: Entry
    point: float
    length_tokens: int


@dataclass(frozen=True, slots=True)
class CellTask:
    """Measure a plan, or transformers' QuantizedCache, on a workload; neither for the reference."""

    workload: str
    placed: Placed | None = None
    quantized: QuantizedCacheSettings | None = None


Task = FactsTask | ProfileTask | PlaceTask | CellTask


@final
class Worker:
    """The model, loaded once, with everything that is made from it once."""

    def __init__(self, setup: Setup) -> None:
        from kvcompress.profile.source import load_source

        self.setup = setup
        self.model, self.tokenizer = load_source(setup.model, setup.device, setup.dtype)
        folder = setup.out / "profiles"
        self.profiles = Profiles(self.model, self.tokenizer, folder, setup.given, setup.calibration)
        self.cells = cell_store(setup.out / "cells", setup.any_code)
        self.plans = Folder(setup.out / "plans", Placed)
        self._suites: dict[str, tuple[WorkloadSuite, str]] = {}
        self._logits: dict[str, Tensor | None] = {}
        self._params: dict[Path, tuple[KVParams, str]] = {}
        self._prompts: dict[int, list[list[int]]] = {}

    @cached_property
    def shape(self) -> ModelShape:
        from kvcompress.checkpoint.compute import stored_dtype
        from kvcompress.runtime.model.families import shape_of

        return shape_of(self.model.config, stored_dtype(self.model))

    @cached_property
    def weights(self) -> str:
        from kvcompress.profile.source import weights_hash

        return weights_hash(self.model)

    @property
    def _weights_as_computed(self) -> str:
        """The same for cells and plans that may share a folder."""
        from kvcompress.checkpoint.compute import stored_dtype

        computed = self.model.dtype
        same = computed == stored_dtype(self.model)
        return self.weights if same else f"{self.weights} in {computed}"

    def params(self, plan: Plan) -> tuple[KVParams, str]:
        """The constants that `plan` runs with, and the hash of their file."""
        from kvcompress.quant.keystats import KVParams

        path = self.profiles.params_path(plan.scorer)
        if path not in self._params:
            self._params[path] = (KVParams.load(path, plan.model), file_hash(path))
        return self._params[path]

    def suite(self, workload: str) -> tuple[WorkloadSuite, str]:
        """The workload's suite and its hash."""
        from kvcompress.evaluate.drawing import Sizes
        from kvcompress.evaluate.workloads import make_workloads
        from kvcompress.evaluate.workloads_run import own_continuation

        if workload not in self._suites:
            (suite,) = make_workloads(
                self.tokenizer,
                Sizes(self.setup.context_tokens, self.shape.max_position, **dict(self.setup.sizes)),
                names=(workload,),
                samples=self.setup.samples,
                seed=self.setup.seed,
                go_on=partial(own_continuation, self.model),
            )
            self._suites[workload] = (suite, suite_hash(suite))
        return self._suites[workload]

    def do(self, task: Task) -> Any:
        """`Facts`, None, a `Placed` or a `Measured`, by the kind of task."""
        if isinstance(task, FactsTask):
            return self.facts(task)
        if isinstance(task, ProfileTask):
            self.profiles.of(task.recipe)
            return None
        return self.place(task) if isinstance(task, PlaceTask) else self.measure(task)

    def facts(self, task: FactsTask) -> Facts:
        from kvcompress.profile.calibration import load_prompts

        suites = [self.suite(name)[0] for name in self.setup.workloads]
        limit = self.shape.max_position
        used = [within(recipe, limit).calibration for recipe in task.recipes]
        unique = {json.dumps(each.model_dump()): each for each in [*used, self.setup.calibration]}
        prompts = [p for each in unique.values() for p in load_prompts(each, self.tokenizer)]
        return Facts(
            shape=self.shape,
            weights_hash=self.weights,
            device=self.model.device.type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            lengths={suite.workload: suite.context_tokens for suite in suites},
            decoded=tuple(s.workload for s in suites if any(d.generated for d in s.documents)),
            shared_windows=shared_windows(prompts, suites),
            refusals={each: each.refusal(self.model.config) for each in task.quantized},
        )

    def place(self, task: PlaceTask) -> Placed:
        """The entry's plan; plans that had to be measured are kept on disk.

        Raises:
            PlanError: if the entry has no plan so small.
        """
        name = self._place_name(task)
        found = self.plans.find(name)
        if found is not None:
            return found
        bench = Bench(
            self.shape, self.profiles.solve, self.profiles.solve_bits_only, self._row_bytes
        )
        placed = place(bench, task.entry, task.point, task.length_tokens)
        if placed.measured:
            self.plans.keep(name, placed)
        return placed

    def measure(self, task: CellTask) -> Measured | None:
        """The outcome, from disk where it is there; None for one that is not to be measured."""
        suite, suite_name = self.suite(task.workload)
        plan = None if task.placed is None else task.placed.plan
        params_hash = "" if plan is None else self.params(plan)[1]
        told = None if plan is None else _nameless(plan).to_json()
        if task.quantized is not None:
            told = task.quantized.told()
        key = cell_key(told, params_hash, suite_name, self._weights_as_computed)
        if self.setup.finished:
            return self.cells.find(key)

        def make() -> Measured:
            begin = time.perf_counter()
            outcome = self._run(suite, plan, task.quantized)
            seconds = round(time.perf_counter() - begin, 2)
            return Measured(key=key, code=code_hash(), seconds=seconds, outcome=outcome)

        return self.cells.get(key, make)

    def _run(
        self, suite: WorkloadSuite, plan: Plan | None, quantized: QuantizedCacheSettings | None
    ) -> WorkloadOutcome:
        from kvcompress.evaluate.workloads_run import Rival, run_workload

        run = partial(run_workload, self.model, self.tokenizer, suite)
        if quantized is not None:
            words = f"QuantizedCache {quantized.model_dump_json()}"
            rival = Rival(words, lambda: quantized.make(self.model.config))
            with uncompiled(quantized, self.model.device):
                return run(reference=self._reference(suite), rival=rival)
        if plan is None:
            return run()
        return run(plan, self.params(plan)[0], reference=self._reference(suite))

    def _reference(self, suite: WorkloadSuite) -> Tensor | None:
        """`reference_logits` of the suite, computed once."""
        from kvcompress.evaluate.workloads_run import reference_logits

        if suite.workload not in self._logits:
            logits = reference_logits(self.model, self.tokenizer, suite)
            self._logits[suite.workload] = logits
        return self._logits[suite.workload]

    def _row_bytes(self, plan: Plan, length_tokens: int) -> int:
        """Mean bytes of a row after a calibration prompt of `length_tokens`."""
        import warnings

        from kvcompress.errors import PositionRangeWarning
        from kvcompress.evaluate.serving import cache_bytes, serving, wider_bytes
        from kvcompress.evaluate.session import Session
        from kvcompress.profile.calibration import load_prompts

        if length_tokens not in self._prompts:
            wanted = _TUNING.model_copy(update={"tokens": length_tokens})
            self._prompts[length_tokens] = load_prompts(wanted, self.tokenizer)
        rows = self._prompts[length_tokens]
        params, _ = self.params(plan)
        limit = self.shape.max_position
        chunk = None if length_tokens <= limit else max(1, limit // 2)
        with warnings.catch_warnings(), serving(self.model, plan, params) as new_cache:
            warnings.simplefilter("ignore", PositionRangeWarning)
            session = Session(self.model, new_cache(), rows[0][0])
            session.prefill(rows, chunk)
            held = round(cache_bytes(session.cache) / len(rows))
            return held - wider_bytes(self.model, plan, length_tokens)

    def _place_name(self, task: PlaceTask) -> str:
        told = (
            task.entry.model_dump_json(exclude={"description", "same_as", "quantized"}),
            f"{task.point:.9g} {task.length_tokens} {self._weights_as_computed} {code_hash()}",
        )
        return hashlib.sha256(" ".join(told).encode()).hexdigest()[:32]


def _nameless(plan: Plan) -> Plan:
    """`plan` without what it is called, so that equal plans of two entries are measured once."""
    unknown = {"predicted_loss": None, "predicted_recall_loss": None}
    return plan.model_copy(update={"target": "league", **unknown})


def shared_windows(prompts: Iterable[Sequence[int]], suites: Iterable[WorkloadSuite]) -> int:
    """Runs of `WINDOW_TOKENS` tokens of the suites' texts that also stand in one of `prompts`."""
    known = {window for prompt in prompts for window in _windows(prompt)}
    found: set[tuple[int, ...]] = set()
    for suite in suites:
        texts = [(*document.prompt, *document.generated) for document in suite.documents]
        if suite.windows is not None:
            texts += [tuple(row) for row in suite.windows.tolist()]
        found |= {window for text in texts for window in _windows(text)} & known
    return len(found)


def _windows(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(len(ids) - WINDOW_TOKENS + 1):
        yield tuple(ids[start : start + WINDOW_TOKENS])
