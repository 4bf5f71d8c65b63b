"""The profiler: passes over the prompts, each prompt kept on disk as soon as it is done.

The first pass reads the keys of some prompts and derives the key constants. The second measures the
parts that the recipe's policy reads, with the very constants that the bundle will ship. Then plans
of several sizes are run on some prompts: they say what a sum of losses costs in fact.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING

import torch

from kvcompress.atomic import write_file
from kvcompress.checkpoint.compute import stored_dtype
from kvcompress.errors import CalibrationError
from kvcompress.plan import Plan
from kvcompress.profile.calibration import data_hash, read_prompts
from kvcompress.profile.collect import held_out_rows
from kvcompress.profile.kinds import far_back_note
from kvcompress.profile.memory import scratch_bytes
from kvcompress.profile.parts import Job, Progress, Steps, begin, measure_parts
from kvcompress.profile.solve import solve
from kvcompress.profile.source import check_vocabulary, weights_hash
from kvcompress.profile.store import PLAN_FILE, SCHEMA_VERSION, Profile, Provenance
from kvcompress.profile.tried import prompts_to_try
from kvcompress.profile.workplace import Workplace
from kvcompress.recipe import Part, Recipe
from kvcompress.runtime.hf.attach import check
from kvcompress.runtime.model.families import shape_of
from kvcompress.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out_dir: Path | str,
    progress: Progress | None = None,
    name: str | None = None,
    also: Collection[Part] = (),
    memory_limit_bytes: int | None = None,
) -> Profile:
    """Profile `model` into `out_dir`; stopped at any moment, the same call goes on.

    Args:
        name: what the profile calls the model; None is its own path.
        also: parts to measure beside those that the recipe's policy reads. A finished profile that
            lacks some gets them, and nothing is measured twice.
        memory_limit_bytes: of this process, weights included, or of what it holds on its GPU; None
            is no limit. With less memory fewer rows are taken at a time, to the same result.

    Raises:
        UnsupportedModelError: if the runtime cannot serve the model.
        CalibrationError: if the calibration data cannot be used.
        ProfileError: if `out_dir` holds a profile by other settings, or something else, or the
            memory limit is too small.
    """
    check(model)
    read = read_prompts(recipe.calibration, tokenizer)
    prompts = [prompt.ids for prompt in read]
    check_vocabulary(model, tokenizer, prompts)
    shape = shape_of(model.config, stored_dtype(model))
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
    missing = (recipe.parts | {*also}) - {*(done.parts if done else ())}
    if done is not None and not missing:
        place.clear()
        return done
    tried = prompts_to_try(read)
    keep = None if done else recipe.keep
    steps = Steps(progress, missing, len(prompts), len(tried), shape.layers, keep)
    scratch = scratch_bytes(model, shape, recipe.calibration.tokens, memory_limit_bytes)
    job = Job(model, tokenizer, recipe, shape, prompts, tried, place, steps, scratch)
    was_training = model.training
    model.eval()
    try:
        begun = begin(job, provenance, name) if done is None else done
        profile = measure_parts(job, begun, missing)
    finally:
        model.train(was_training)
    profile = profile.model_copy(update={"calibration_note": far_back_note(read)})
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
    also: Collection[Part] = (),
    memory_limit_bytes: int | None = None,
) -> Plan:
    """As `run`, then solve the recipe's own policy and write it beside the profile."""
    profile = run(model, tokenizer, recipe, out_dir, progress, name, also, memory_limit_bytes)
    plan = solve(profile)
    write_file(Path(out_dir) / PLAN_FILE, plan.to_json())
    return plan


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
