"""The parts of a profile: which forwards each takes, and the fields that come of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvcompress.plan import ModelShape
from kvcompress.profile import surrogate
from kvcompress.profile.candidates import (
    candidates,
    fastgen_ladder,
    fastgen_policy,
    fewer_exact,
    lower_envelope,
    small_candidates,
)
from kvcompress.profile.collect import key_moments
from kvcompress.profile.kinds import Prompt
from kvcompress.profile.losses import Candidates
from kvcompress.profile.measure import (
    PromptResult,
    Setup,
    l1_distance,
    measure_prompt,
    over_prompts,
)
from kvcompress.profile.repeat import head_scores
from kvcompress.profile.sensitivity import why_no_gradients
from kvcompress.profile.source import weight_bytes
from kvcompress.profile.store import (
    PARAMS_FILE,
    ExactSetting,
    Profile,
    Provenance,
    Table,
    file_sha256,
)
from kvcompress.profile.tried import try_plans
from kvcompress.profile.weights import measure_weights
from kvcompress.profile.workplace import Workplace
from kvcompress.quant.keystats import KeyStats, KVParams, derive
from kvcompress.recipe import PARTS, Keep, Part, Recipe
from kvcompress.runtime.model.rotation import LayerRotation, find_rotations
from kvcompress.tokenizer import (
    opening_ids,
    punct_ids,
    repeat_ids,
    special_ids,
    tokenizer_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_PROMPTS: Final = 4  # prompts that are read twice for the scores of heads
KEY_PROMPTS: Final = 8  # prompts for the key constants; moments of 4 k tokens are exact enough
SHARE_QUANTILE: Final = 0.95
Progress = Callable[[int, int], None]  # (finished steps, all steps)


class Steps:
    """Counts finished work for the caller's progress bar; the unit is one plain forward.

    The factors are what SmolLM2-135M takes; the last unit is the saved profile.
    """

    RECOVERY: Final = 2
    LOSSES: Final = 5
    TWICE: Final = 2  # a prompt that is read twice
    TRIED: Final = 3

    def __init__(
        self,
        progress: Progress | None,
        parts: Collection[Part],
        prompts: int,
        tried: int,
        layers: int,
        keep: Keep | None,
    ) -> None:
        """
        Args:
            parts: those that are to be measured.
            prompts, tried: of the profile, and those of them that plans are run on.
            keep: of a profile that has nothing yet; None where only parts are added.
        """
        self.progress = progress
        self.measured = self.LOSSES if "losses" in parts else self.RECOVERY
        read_twice = prompts * (keep is not None and surrogate.needed(keep))
        read_twice += min(prompts, HEAD_PROMPTS) * ("heads" in parts)
        keys, saved = min(prompts, KEY_PROMPTS) * (keep is not None), 1
        self.total = keys + read_twice * self.TWICE + tried * self.TRIED
        self.total += saved + layers * ("weights" in parts)
        if {"recovery", "losses"} & {*parts}:
            self.total += prompts * self.measured
        self.done = 0

    def add(self, count: int) -> None:
        self._tell(min(self.done + count, self.total - 1))

    def read_twice(self, prompts: int) -> None:
        self.add(prompts * self.TWICE)

    def tried(self) -> None:
        self.add(self.TRIED)

    def finish(self) -> None:
        self._tell(self.total)

    def _tell(self, done: int) -> None:
        self.done = done
        if self.progress is not None:
            self.progress(done, self.total)


@dataclass(frozen=True)
class Job:
    """What is profiled, on what, and where finished steps are kept.

    Attributes:
        tried: the prompts that plans are run on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    shape: ModelShape
    prompts: list[list[int]]
    tried: list[Prompt]
    place: Workplace
    steps: Steps
    scratch_bytes: int

    @cached_property
    def rotations(self) -> list[LayerRotation]:
        return find_rotations(self.model, self.shape, self.prompts[0][-1])


def begin(job: Job, provenance: Provenance, name: str | None) -> Profile:
    """A profile without parts: the key constants, written beside it, and what the scorer learns."""
    model, shape, recipe = job.model, job.shape, job.recipe
    rotations = job.rotations
    params = _key_constants(job, rotations)
    student = None
    if surrogate.needed(recipe.keep):
        opening = len(opening_ids(job.tokenizer))
        student = surrogate.train(
            model, shape, job.prompts, opening, job.place, job.steps.read_twice
        )
        params = replace(params, scorer={surrogate.KEPT: student.weights})
    staged, kept = (job.place.directory / name for name in (f".{PARAMS_FILE}", PARAMS_FILE))
    params.save(staged)
    staged.replace(kept)
    tokens = torch.tensor(job.prompts)
    classes = special_ids(job.tokenizer), punct_ids(job.tokenizer)
    special, punct = (_share(tokens, ids) for ids in classes)
    return Profile(
        parts=(),
        model=name or model.config.name_or_path or type(model).__name__,
        shape=shape,
        recipe=recipe,
        provenance=provenance,
        tokenizer_hash=tokenizer_hash(job.tokenizer),
        weight_bytes=weight_bytes(model),
        special_ids=classes[0],
        punct_ids=classes[1],
        repeat_ids=repeat_ids(job.tokenizer),
        special_share=special,
        punct_share=punct,
        rotations=tuple(found.note for found in rotations),
        surrogate_r2=None if student is None else student.table(),
        params_sha256=file_sha256(kept),
    )


def measure_parts(job: Job, profile: Profile, missing: Collection[Part]) -> Profile:
    """`profile` with the parts that it lacks, and with the plans that these allow to try."""
    setup, note = _setup(job, profile, missing)
    found: dict[str, object] = {}
    if setup.ladder or setup.losses:
        found |= _tables(job, setup, missing)
    if setup.losses:
        found |= {"loss_unit": "nats" if setup.gradients else "residual", "loss_note": note}
    if "weights" in missing:
        found["weight_layers"] = measure_weights(
            job.model, job.shape.layers, job.prompts, job.steps.add
        )
    if "heads" in missing:
        found["repeat_heads"] = _head_scores(job)
    parts = tuple(part for part in PARTS if part in {*profile.parts, *missing})
    measured = Profile.model_validate({**dict(profile), **found, "parts": parts})
    tried = try_plans(job.model, setup, job.tried, measured, job.steps.tried)
    return measured.model_copy(update={"tried": tried})


def _setup(job: Job, profile: Profile, missing: Collection[Part]) -> tuple[Setup, str]:
    """What is measured on every prompt, and why losses cannot be in nats, empty where they can."""
    recipe, dim = job.recipe, job.shape.head_dim
    losses: tuple[tuple[Keep, Candidates], ...] = ()
    note = ""
    if "losses" in missing:
        note = why_no_gradients(job.model, job.shape, recipe.keep, job.prompts[0])
        fewer = [(keep, small_candidates(recipe, dim)) for keep in fewer_exact(recipe.keep)]
        both = [(recipe.keep, candidates(recipe, dim)), *fewer]
        losses = tuple((keep, Candidates.of(heads)) for keep, heads in both)
    setup = Setup(
        job.shape,
        recipe.keep,
        profile.special_ids,
        profile.punct_ids,
        fastgen_ladder(fastgen_policy(recipe)) if "recovery" in missing else (),
        losses,
        profile.load_params(job.place.directory),
        gradients=not note,
        rotations=tuple(found.rotation for found in job.rotations),
        scratch_bytes=job.scratch_bytes,
    )
    return setup, note


def _share(tokens: Tensor, ids: tuple[int, ...]) -> float:
    """Share of a prompt's tokens that `ids` name, a high quantile over ``[prompts, S]``."""
    member = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype))
    return float(torch.quantile(member.float().mean(1), SHARE_QUANTILE))


def _key_constants(job: Job, rotations: list[LayerRotation]) -> KVParams:
    turned = [found.rotation for found in rotations]
    parts: list[list[KeyStats]] = []
    for number, ids in enumerate(job.prompts[:KEY_PROMPTS]):

        def measured(ids: list[int] = ids) -> dict[str, Tensor]:
            moments = key_moments(job.model, job.shape, turned, ids)
            return {
                "count": torch.tensor([layer.count for layer in moments]),
                "mean": torch.stack([layer.mean for layer in moments]),
                "var": torch.stack([layer.var for layer in moments]),
            }

        kept = job.place.step(f"{number:04d}.keys", measured)
        layers = zip(kept["count"].tolist(), kept["mean"], kept["var"], strict=True)
        parts.append([KeyStats(*layer) for layer in layers])
        job.steps.add(1)
    merged = [reduce(KeyStats.merge, layer) for layer in zip(*parts, strict=True)]
    return derive(merged, turned, job.shape.max_position)


def _tables(job: Job, setup: Setup, missing: Collection[Part]) -> dict[str, object]:
    """The tables of recovery and of losses, as far as they are missing, over all prompts."""
    results = []
    step = "+".join(part for part in PARTS[:2] if part in missing)
    for number, ids in enumerate(job.prompts):

        def measured(ids: list[int] = ids) -> dict[str, Tensor]:
            return dict(vars(measure_prompt(job.model, setup, ids)))

        results.append(PromptResult(**job.place.step(f"{number:04d}.{step}", measured)))
        job.steps.add(job.steps.measured)
    found: dict[str, object] = {}
    if setup.ladder:
        recovery = over_prompts(torch.stack([r.recovery for r in results]))
        found |= {"chain": setup.ladder, "recovery": _table(recovery)}
        found["recovery_l1"] = _table(l1_distance(recovery))
    if setup.losses:
        losses = torch.stack([r.loss for r in results]).mean(0)
        own, *fewer = _settings(setup, losses)
        found |= {"candidates": own.candidates, "losses": own.losses, "fewer": tuple(fewer)}
    return found


def _settings(setup: Setup, losses: Tensor) -> list[ExactSetting]:
    """The tables of each setting of exact tokens, from their columns side by side."""
    parts = losses.split([len(found.heads) for _, found in setup.losses], dim=-1)
    return [
        ExactSetting(
            sink_tokens=keep.sink_tokens,
            recent_tokens=keep.recent_tokens,
            candidates=found.heads,
            losses=_table(lower_envelope(part, found.heads)),
        )
        for (keep, found), part in zip(setup.losses, parts, strict=True)
    ]


def _head_scores(job: Job) -> tuple[tuple[float, ...], ...]:
    """KVzip's scores of heads; empty where every prompt is too short to be read twice."""
    opening, sinks = len(opening_ids(job.tokenizer)), job.recipe.keep.sink_tokens
    long = [ids for ids in job.prompts[:HEAD_PROMPTS] if len(ids) // 4 > opening + sinks]
    if not long:
        return ()
    return head_scores(job.model, job.shape, long, opening, sinks, job.steps.read_twice)


def _table(values: Tensor) -> Table:
    """Nested tuples of six significant digits: more would be noise."""
    return tuple(
        tuple(tuple(float(f"{x:.6g}") for x in row) for row in layer) for layer in values.tolist()
    )
