"""The profiler: two passes over the prompts, each prompt kept on disk as soon as it is done.

Pass one reads the keys of the first prompts and derives the key constants. Pass two measures
recovery and losses on all prompts, with the very constants that the bundle will ship.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvcompress.atomic import write_file
from kvcompress.errors import CalibrationError
from kvcompress.plan import ROUNDED, ModelShape, Plan
from kvcompress.profile import surrogate
from kvcompress.profile.calibration import data_hash, read_prompts
from kvcompress.profile.candidates import (
    candidates,
    fastgen_ladder,
    fastgen_policy,
    fewer_exact,
    lower_envelope,
    small_candidates,
)
from kvcompress.profile.collect import held_out_rows, key_moments
from kvcompress.profile.kinds import far_back_note
from kvcompress.profile.measure import (
    PromptResult,
    Setup,
    l1_distance,
    measure_prompt,
    over_prompts,
)
from kvcompress.profile.repeat import head_scores
from kvcompress.profile.sensitivity import why_no_gradients
from kvcompress.profile.solve import solve
from kvcompress.profile.source import check_vocabulary, weight_bytes, weights_hash
from kvcompress.profile.store import (
    PARAMS_FILE,
    PLAN_FILE,
    SCHEMA_VERSION,
    ExactSetting,
    Profile,
    Provenance,
    Table,
    file_sha256,
)
from kvcompress.profile.weights import WEIGHT_PROMPTS, measure_weights
from kvcompress.profile.workplace import Workplace
from kvcompress.quant.keystats import KeyStats, KVParams, derive
from kvcompress.recipe import Recipe
from kvcompress.runtime.hf.attach import check
from kvcompress.runtime.model.families import shape_of
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


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out_dir: Path | str,
    progress: Progress | None = None,
    name: str | None = None,
) -> Profile:
    """Profile `model` into `out_dir`; stopped at any moment, the same call goes on.

    Args:
        name: what the profile calls the model; None is its own path.

    Raises:
        UnsupportedModelError: if the runtime cannot serve the model.
        CalibrationError: if the calibration data cannot be used.
        ProfileError: if `out_dir` holds a profile by other settings, or something else.
    """
    check(model)
    read = read_prompts(recipe.calibration, tokenizer)
    prompts = [prompt.ids for prompt in read]
    check_vocabulary(model, tokenizer, prompts)
    shape = shape_of(model.config, model.dtype)
    if recipe.calibration.tokens > shape.max_position:
        raise CalibrationError(
            f"calibration.tokens is {recipe.calibration.tokens}, the model was made for "
            f"{shape.max_position} positions; set it to {shape.max_position} or lower"
        )
    provenance = _provenance(model, recipe, prompts)
    place = Workplace(
        Path(out_dir),
        {
            "recipe": recipe.model_dump(mode="json", include={"calibration", "keep", "policy"}),
            "model": shape.model_dump(mode="json"),
            "weights": provenance.weights_hash,
            "calibration data": provenance.data_hash,
            "tokenizer": tokenizer_hash(tokenizer),
            "schema": SCHEMA_VERSION,
        },
    )
    done = place.finished()
    if done is not None:
        place.clear()
        return done
    steps = _Steps(progress, len(prompts), shape.layers, surrogate.needed(recipe.keep))
    was_training = model.training
    model.eval()
    try:
        params, found = _measured(model, tokenizer, recipe, shape, prompts, place, steps)
    finally:
        model.train(was_training)
    staged, kept = place.directory / f".{PARAMS_FILE}", place.directory / PARAMS_FILE
    params.save(staged)
    staged.replace(kept)
    profile = Profile(
        model=name or model.config.name_or_path or type(model).__name__,
        shape=shape,
        recipe=recipe,
        provenance=provenance,
        tokenizer_hash=tokenizer_hash(tokenizer),
        weight_bytes=weight_bytes(model),
        params_sha256=file_sha256(kept),
        calibration_note=far_back_note(read),
        **found,  # type: ignore[arg-type]
    )
    profile.save(place.directory)
    place.clear()
    steps.finish()
    return profile


def run_and_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out_dir: Path | str,
    progress: Progress | None = None,
    name: str | None = None,
) -> Plan:
    """As `run`, then solve the recipe's own policy and write it beside the profile."""
    profile = run(model, tokenizer, recipe, out_dir, progress, name)
    plan = solve(profile)
    write_file(Path(out_dir) / PLAN_FILE, plan.to_json())
    return plan


class _Steps:
    """Counts finished work for the caller's progress bar; the unit is one plain forward.

    The factors are what the shipped model takes; the last unit is the saved profile.
    """

    MEASURE: Final = 16
    TWICE: Final = 2  # a prompt that is read twice

    def __init__(self, progress: Progress | None, prompts: int, layers: int, trains: bool) -> None:
        self.progress = progress
        weights = min(prompts, WEIGHT_PROMPTS) * (1 + len(ROUNDED) * layers)
        read_twice = min(prompts, HEAD_PROMPTS) + prompts * trains
        keys, trial, saved = min(prompts, KEY_PROMPTS), 1, 1
        self.total = keys + trial + prompts * self.MEASURE + read_twice * self.TWICE + weights
        self.total += saved
        self.done = 0

    def add(self, count: int) -> None:
        self._tell(min(self.done + count, self.total - 1))

    def trained(self, prompts: int) -> None:
        self.add(prompts * self.TWICE)

    scored = trained

    def finish(self) -> None:
        self._tell(self.total)

    def _tell(self, done: int) -> None:
        self.done = done
        if self.progress is not None:
            self.progress(done, self.total)


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    shape: ModelShape,
    prompts: list[list[int]],
    place: Workplace,
    steps: _Steps,
) -> tuple[KVParams, dict[str, object]]:
    """The constants that a bundle ships, and the measured fields of a `Profile`."""
    rotations = find_rotations(model, shape, prompts[0][-1])
    params = _key_constants(model, shape, rotations, prompts, place, steps)
    no_gradients = why_no_gradients(model, shape, recipe.keep, prompts[0])
    steps.add(1)
    opening, student = len(opening_ids(tokenizer)), None
    if surrogate.needed(recipe.keep):
        student = surrogate.train(model, shape, prompts, opening, place, steps.trained)
        params = replace(params, scorer={surrogate.KEPT: student.weights})
    setup = Setup(
        shape,
        recipe.keep,
        special_ids(tokenizer),
        punct_ids(tokenizer),
        fastgen_ladder(fastgen_policy(recipe)),
        candidates(recipe, shape.head_dim),
        tuple((k, small_candidates(shape.head_dim)) for k in fewer_exact(recipe.keep)),
        params,
        gradients=not no_gradients,
        rotations=tuple(found.rotation for found in rotations),
    )
    results = []
    for number, ids in enumerate(prompts):

        def measured(ids: list[int] = ids) -> dict[str, Tensor]:
            return dict(vars(measure_prompt(model, setup, ids)))

        results.append(PromptResult(**place.step(f"{number:04d}", measured)))
        steps.add(_Steps.MEASURE)
    weight_layers = measure_weights(model, shape.layers, prompts, steps.add)
    sinks = recipe.keep.sink_tokens
    long = [ids for ids in prompts[:HEAD_PROMPTS] if len(ids) // 4 > opening + sinks]
    heads = head_scores(model, shape, long, opening, sinks, steps.scored) if long else ()
    return params, {
        **_tables(setup, results),
        "repeat_ids": repeat_ids(tokenizer),
        "rotations": tuple(found.note for found in rotations),
        "loss_note": no_gradients,
        "weight_layers": weight_layers,
        "repeat_heads": heads,
        "surrogate_r2": None if student is None else student.table(),
    }


def _key_constants(
    model: PreTrainedModel,
    shape: ModelShape,
    rotations: list[LayerRotation],
    prompts: list[list[int]],
    place: Workplace,
    steps: _Steps,
) -> KVParams:
    turned = [found.rotation for found in rotations]
    parts: list[list[KeyStats]] = []
    for number, ids in enumerate(prompts[:KEY_PROMPTS]):

        def measured(ids: list[int] = ids) -> dict[str, Tensor]:
            moments = key_moments(model, shape, turned, ids)
            return {
                "count": torch.tensor([layer.count for layer in moments]),
                "mean": torch.stack([layer.mean for layer in moments]),
                "var": torch.stack([layer.var for layer in moments]),
            }

        kept = place.step(f"{number:04d}.keys", measured)
        layers = zip(kept["count"].tolist(), kept["mean"], kept["var"], strict=True)
        parts.append([KeyStats(*layer) for layer in layers])
        steps.add(1)
    merged = [reduce(KeyStats.merge, layer) for layer in zip(*parts, strict=True)]
    return derive(merged, turned, shape.max_position)


def _tables(setup: Setup, results: list[PromptResult]) -> dict[str, object]:
    """Fields of a `Profile` that sum up the results of all prompts."""
    recovery = over_prompts(torch.stack([r.recovery for r in results]))
    losses = torch.stack([r.loss for r in results]).mean(0)
    shares = torch.quantile(torch.stack([r.shares for r in results]), SHARE_QUANTILE, dim=0)
    return {
        "special_ids": setup.special_ids,
        "punct_ids": setup.punct_ids,
        "special_share": float(shares[0]),
        "punct_share": float(shares[1]),
        "chain": setup.ladder,
        "recovery": _table(recovery),
        "recovery_l1": _table(l1_distance(recovery)),
        "candidates": setup.heads,
        "losses": _table(lower_envelope(losses[..., : len(setup.heads)], setup.heads)),
        "fewer": _fewer(setup, losses[..., len(setup.heads) :]),
        "loss_unit": "nats" if setup.gradients else "residual",
        "path_nats": _path_nats(results),
    }


def _fewer(setup: Setup, losses: Tensor) -> tuple[ExactSetting, ...]:
    """Tables of the settings with fewer exact tokens, from their columns side by side."""
    parts = losses.split([len(heads) for _, heads in setup.fewer], dim=-1)
    return tuple(
        ExactSetting(
            sink_tokens=keep.sink_tokens,
            recent_tokens=keep.recent_tokens,
            candidates=heads,
            losses=_table(lower_envelope(part, heads)),
        )
        for (keep, heads), part in zip(setup.fewer, parts, strict=True)
    )


def _path_nats(results: list[PromptResult]) -> tuple[float, ...]:
    """Mean over prompts; a rise that noise has reversed is flat."""
    mean = torch.stack([r.path_nats for r in results]).mean(0).clamp_min(0)
    return tuple(float(f"{x:.6g}") for x in mean.cummax(0).values.tolist())


def _table(values: Tensor) -> Table:
    """Nested tuples of six significant digits: more would be noise."""
    return tuple(
        tuple(tuple(float(f"{x:.6g}") for x in row) for row in layer) for layer in values.tolist()
    )


def _provenance(model: PreTrainedModel, recipe: Recipe, prompts: list[list[int]]) -> Provenance:
    return Provenance(
        data=recipe.calibration.words(),
        data_hash=data_hash(prompts),
        weights_hash=weights_hash(model),
        prompts=len(prompts),
        prompt_tokens=len(prompts[0]),
        held_out_rows=held_out_rows(len(prompts[0])),
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        versions={
            "python": python_version(),  # whose documentation the built-in prompts are made of
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    )
