"""Export: from a finished profile to a bundle. It appears whole, or nothing is changed."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import kvcompress
from kvcompress import atomic
from kvcompress.bundle import files, manifest, mixed, source
from kvcompress.bundle.card import model_card, size
from kvcompress.bundle.expected import Expected
from kvcompress.bundle.manifest import BaseModelEntry, Manifest, WeightsEntry, is_bundle
from kvcompress.bundle.source import Source
from kvcompress.bundle.verify import VerifyReport, check_logits
from kvcompress.errors import BundleError, ProfileError
from kvcompress.plan import Plan
from kvcompress.profile.solve import solve_recipe, with_calibration_of
from kvcompress.profile.source import weights_hash
from kvcompress.profile.store import PARAMS_FILE, PLAN_FILE, Profile
from kvcompress.quant.weights import FORMATS
from kvcompress.quant.weights.base import (
    WeightFormat,
    output_heads,
    weights_bytes,
)
from kvcompress.recipe import BytesPolicy, Recipe, WeightScheme
from kvcompress.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from kvcompress.checkpoint.load import DeviceMap

_NEEDS: Final = ("torch>=2.9", "transformers>=5.17")
_SHARD: Final = "5GB"
_UNPACKED: Final = "unpacked"  # inside of what is being written, so that nothing of it stays behind
_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CALIBRATION_KEYS: Final = ("dataset", "tokenizer")  # where GPTQ-like configs keep their texts


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        digest: sha256 of the manifest.
        kept: linear layers left in 16 bits because their sizes do not fit the format, or because
            the plan says so.
        planned_bytes: bytes of the weights that the plan counted; None where it leaves them open.
        tensor_bytes: the same, measured: all tensors of the weight files, labels of formats aside.
        reload_error: ‖a − b‖ / ‖b‖ between logits of the reloaded and of the saved weights.
        lossless_error: the same between a compressed cache that keeps everything and a plain one.
    """

    path: str
    digest: str
    weights_format: WeightScheme
    weights_bytes: int
    base_weights_bytes: int
    bundle_bytes: int
    kept: tuple[str, ...]
    planned_bytes: int | None
    tensor_bytes: int
    reload_error: float
    lossless_error: float


@dataclass(frozen=True)
class _Job:
    """Everything that is known before the first byte is written."""

    source: Source
    profile: Profile
    params: Path
    plan: Plan
    recipe: Recipe
    format: WeightFormat
    kept: tuple[str, ...]
    measured: Mapping[str, float]


def export(
    model: Path | str | None,
    profile: Path | str,
    out: Path | str,
    *,
    plan: Plan | None = None,
    recipe: Recipe | None = None,
    weights: WeightScheme | None = None,
    overwrite: bool = False,
    measured: Mapping[str, float] | None = None,
    device_map: DeviceMap = None,
    note: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write a bundle, check it in a fresh process and put it in place.

    Args:
        model: the model that was profiled, not quantized: a directory or a name on the Hub; None
            is where the profile found it.
        profile: finished profile directory.
        plan: in place of the profile's own.
        recipe: in place of the profile's own: solved from the profile where no plan is given, and
            kept in the bundle.
        weights: in place of the recipe's.
        overwrite: replace an existing bundle, at the end and in one step.
        measured: figures for the model card and the manifest, by name.
        device_map: where the weights are quantized; None is the CPU.
        note: told what is going on, one line at a time.

    Raises:
        PlanError: if the profile did not measure what the recipe needs.
        BundleError: if something does not fit or the written bundle fails its check; `out` is as
            it was before.
    """
    target = Path(os.path.realpath(out))
    _check_target(target, overwrite)
    job = _prepare(Path(profile), model, plan, recipe, weights, measured or {})
    _check_space(target, job)
    with _one_line(target), atomic.directory(target) as staged:
        _check_target(target, overwrite)  # another export may have written it meanwhile
        unpacked = staged / _UNPACKED
        if job.source.is_unpacked:
            note(f"unpacking {job.source.id} to 16 bits")
            job = replace(job, source=job.source.in_16_bits(unpacked))
        note(f"loading {job.source.id} and storing its weights as {job.format.name}")
        _check_weights(Path(profile), job)
        expected, found = _write_weights(job, staged, device_map)
        shutil.rmtree(unpacked, ignore_errors=True)
        gc.collect()  # the fresh process needs the memory
        note("writing the plan, the model card and the manifest")
        _write_rest(job, staged, found)
        files.same_permissions(staged)
        note("checking the bundle in a fresh process")
        checked = _check_in_fresh_process(staged, target, expected)
    assert checked.reload_error is not None, "the fresh process was given the logits to expect"
    entries = manifest.parse((target / manifest.MANIFEST).read_bytes(), str(target))
    return ExportReport(
        path=str(out),
        digest=checked.digest,
        weights_format=job.format.name,
        weights_bytes=entries.weights.size_bytes,
        base_weights_bytes=_bf16_bytes(job.source),
        bundle_bytes=sum(entries.sizes_bytes.values()),
        kept=job.kept,
        planned_bytes=mixed.planned_bytes(job.profile, job.plan),
        tensor_bytes=mixed.tensor_bytes(target),
        reload_error=checked.reload_error,
        lossless_error=checked.lossless_error,
    )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not is_bundle(target):
        raise BundleError(f"{target}: exists and is not a bundle; choose another place for it")
    if not overwrite:
        raise BundleError(f"{target}: a bundle is there already; add --overwrite to replace it")


def _prepare(
    profile: Path,
    model: Path | str | None,
    plan: Plan | None,
    recipe: Recipe | None,
    weights: WeightScheme | None,
    measured: Mapping[str, float],
) -> _Job:
    """Read and check everything that the bundle is made of, before any weight is loaded."""
    stored = Profile.load(profile)
    if plan is None and recipe is not None:
        plan = solve_recipe(stored, recipe, weights=weights)
    if plan is None and not (profile / PLAN_FILE).is_file():
        raise ProfileError(f"{profile}: has no {PLAN_FILE}; run kvcompress plan, or give --plan")
    if plan is None:
        _check_counted(profile, stored.recipe, weights)
    plan = plan or Plan.load(profile / PLAN_FILE)
    recipe = with_calibration_of(stored, recipe) if recipe else stored.recipe
    scheme = mixed.scheme_of(profile, stored, plan, weights) or recipe.weights
    recipe = recipe.model_copy(update={"weights": scheme})
    found = source.find(model or stored.model)
    _check_fit(profile, found, plan)
    stored.load_params(profile)
    weight_format = FORMATS[recipe.weights]
    kept = mixed.kept_layers(found.skeleton, weight_format, stored, plan)
    params = profile / PARAMS_FILE
    return _Job(found, stored, params, plan, recipe, weight_format, kept, measured)


def _check_counted(profile: Path, recipe: Recipe, weights: WeightScheme | None) -> None:
    """Refuse other weights than a memory target counted, with which the plan would not meet it."""
    policy, own = recipe.policy, recipe.weights
    if not isinstance(policy, BytesPolicy) or policy.memory is None or own == "bf16":
        return
    if weights not in (None, own):
        raise BundleError(
            f"{profile}: its plan meets {policy.memory} with {own} weights; leave --weights out, "
            "or give --recipe too, which is then solved again"
        )


def _check_fit(profile: Path, found: Source, plan: Plan) -> None:
    from kvcompress.runtime.model.families import config_hash

    if plan.model.config_hash != config_hash(found.config):
        raise BundleError(
            f"{profile}: its plan was made for another model than {found.location}; "
            "profile this model, or give the profiled one with --model"
        )
    if plan.tokenizer_hash not in (None, tokenizer_hash(found.tokenizer)):
        raise BundleError(
            f"{profile}: its plan was made with another tokenizer than that of {found.location}, "
            "so its special and punctuation ids mean other tokens; profile again"
        )


def _check_weights(profile: Path, job: _Job) -> None:
    """Refuse another model of the same architecture, to whose heads the profile does not apply."""
    if weights_hash(job.source.load("cpu", dtype="auto")) != job.profile.provenance.weights_hash:
        raise BundleError(
            f"{profile}: it profiled other weights than those of {job.source.location}; "
            "profile this model, or give the profiled one with --model"
        )


def _bf16_bytes(found: Source) -> int:
    return 2 * sum(parameter.numel() for parameter in found.skeleton.parameters())


def _check_space(target: Path, job: _Job) -> None:
    """Refuse before any weight is loaded where the disk has too little room. The estimate may be a
    little low but is never too high."""
    folder = next(parent for parent in target.parents if parent.exists())
    heads = output_heads(job.source.skeleton)
    needed_bytes = weights_bytes(job.source.skeleton, job.format, (*job.kept, *heads))
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"{target}: {size(free_bytes)} are free and the weights alone take about "
            f"{size(needed_bytes)}; free some space or choose another place"
        )


@contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """Within the block, an error of the system becomes one that names the bundle and not the hidden
    directory in which it is written."""
    from safetensors import SafetensorError

    todo = "free some space and export again; nothing was changed"
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise BundleError(f"{target}: {error.strerror}; {todo}") from error
        reason = error.strerror or str(error)
        raise BundleError(f"{target}: the bundle cannot be written ({reason})") from error
    except SafetensorError as error:  # safetensors wraps the system's errors
        if any(f"(os error {code})" in str(error) for code in _FULL_DISK):
            raise BundleError(f"{target}: the weights do not fit on the disk; {todo}") from error
        raise BundleError(f"{target}: the weights cannot be written: {error}") from error


def _write_weights(
    job: _Job, staged: Path, device_map: DeviceMap
) -> tuple[Expected, list[dict[str, str]]]:
    """Save the weights, then return what to expect and `probe` of the model they came from."""
    from kvcompress.runtime.check.probe import as_rows, probe

    skip = (*output_heads(job.source.skeleton), *job.kept)
    model = job.source.load(device_map=device_map, **job.format.load_kwargs(skip))
    # Before any forward: bitsandbytes repacks 4-bit weights for the CPU in the first one.
    model.save_pretrained(staged, max_shard_size=_SHARD)
    _write_index(staged)
    _patch_config(staged / "config.json")
    job.source.tokenizer.save_pretrained(staged)
    expected = Expected.of(check_logits(model), model, job.plan, job.params)
    found = probe(model, job.source.id)
    if found.refused is not None:
        raise BundleError(f"{job.source.location}: {found.refused}")
    return expected, as_rows(found)


def _write_index(staged: Path) -> None:
    """Write the index even for one file: without it some loaders read every safetensors file they
    find."""
    from safetensors import safe_open

    path = staged / manifest.INDEX
    if path.exists():
        return
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in sorted(staged.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            names = list(tensors.keys())
        weight_map |= dict.fromkeys(names, shard.name)
        total_bytes += shard.stat().st_size
    _write_json(path, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _patch_config(path: Path) -> None:
    """Point to the manifest; take out calibration texts and where the model lay."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    for key in _CALIBRATION_KEYS:
        config.get("quantization_config", {}).pop(key, None)
    config["kvcompress"] = {"schema": manifest.SCHEMA, "manifest": manifest.MANIFEST}
    _write_json(path, config)


def _write_rest(job: _Job, staged: Path, found: list[dict[str, str]]) -> None:
    """Write everything but the weights, the manifest last, because it hashes all other files."""
    (staged / manifest.FOLDER).mkdir()
    for path in job.source.legal:
        shutil.copyfile(path, staged / path.name)
    shutil.copyfile(job.params, staged / manifest.PARAMS)
    job.profile.model_copy(update={"model": job.source.id}).save(staged / manifest.FOLDER)
    (staged / manifest.PLAN).write_text(job.plan.to_json(), encoding="utf-8")
    (staged / manifest.RECIPE).write_text(job.recipe.to_yaml(), encoding="utf-8")
    stored_bytes = sum(path.stat().st_size for path in staged.glob("*.safetensors"))
    card = model_card(
        job.source.id,
        job.source.license,
        job.plan,
        job.format.name,
        stored_bytes,
        _bf16_bytes(job.source),
        job.measured,
        found,
    )
    (staged / manifest.CARD).write_text(card, encoding="utf-8")
    written = Manifest(
        schema=manifest.SCHEMA,
        kvcompress_version=kvcompress.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=BaseModelEntry(id=job.source.id, config_hash=job.plan.model.config_hash),
        tokenizer_hash=tokenizer_hash(job.source.tokenizer),
        weights=WeightsEntry(format=job.format.name, size_bytes=stored_bytes, kept=job.kept),
        needs=(*_NEEDS, *job.format.needs),
        measured=dict(job.measured),
        files=files.digests(staged, files.tree(staged)),
    )
    (staged / manifest.MANIFEST).write_text(written.to_json(), encoding="utf-8")


def _check_in_fresh_process(staged: Path, target: Path, expected: Expected) -> VerifyReport:
    """Load what was written where nothing of this process can help it."""
    package = str(Path(kvcompress.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "expected.safetensors"
        expected.save(told)
        command = [sys.executable, "-P", "-m", "kvcompress.bundle.verify", str(staged)]
        result = subprocess.run(
            [*command, "--expected", str(told)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
    if result.returncode < 0:
        raise BundleError(
            f"{target}: the check of the written bundle was killed by signal {-result.returncode}, "
            "likely for lack of memory; free some and export again"
        )
    if result.returncode > 0:
        lines = result.stderr.strip().split("\n")
        reason = lines[-1].removeprefix("error: ").replace(str(staged), str(target))
        raise BundleError(f"the written bundle failed its check, nothing was changed: {reason}")
    return VerifyReport(**json.loads(result.stdout.strip().split("\n")[-1]))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
