"""Rivals that take their turns in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvcompress.bench.entries import Entry, Ready, Size, step_weight_bytes
from kvcompress.bench.result import Facts, Kind, Timing
from kvcompress.evaluate.quality import weights_bytes
from kvcompress.measure.timing import Case, Samples, Window
from speed.malloc import environment
from speed.model import Models
from speed.protocol import Worker, WorkerError

ROOT: Final = Path(__file__).parents[2]
HF_WORKER: Final = ROOT / "benchmarks" / "speed" / "hf_worker.py"
VLLM_WORKER: Final = ROOT / "benchmarks" / "vllm_cpu" / "run.py"
KEPT: Final = 0.2
ROWS_APART: Final = 64  # rows whose prompts are read first decode while the others' are read


@dataclass(frozen=True, slots=True)
class Pythons:
    """Interpreters of the rivals' environments."""

    quant: Path = ROOT / ".venv-quant" / "bin" / "python"
    kvpress: Path = ROOT / ".venv-kvpress" / "bin" / "python"
    vllm: Path = ROOT / ".venv-vllm" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Job:
    """A worker to start.

    Attributes:
        reads: its windows are whole prompts and not decode steps.
    """

    name: str
    kind: Kind
    command: Sequence[str]
    environment: Mapping[str, str]
    weights: str
    prompt: bool = False
    reads: bool = False
    detail: str = ""


def untuned_entry(models: Models, size: Size) -> Entry:
    """DynamicCache under glibc's own thresholds: every copy of a large cache is fresh memory."""
    name = "DynamicCache float32, default malloc"
    command = hf_command(Path(sys.executable), "dynamic", "float32", models.scale, size)
    detail = "glibc maps large blocks anew at each step and faults in every page"
    job = Job(
        name, "artefact", command, environment(size.threads, "default"), "float32", detail=detail
    )
    return worker_entry(job, models, size)


def quantized_entry(
    models: Models, pythons: Pythons, backend: str, bits: int, size: Size, weights: str = "float32"
) -> Entry:
    """A `QuantizedCache` whose backend needs a package."""
    name = f"QuantizedCache {backend} int{bits}"
    command = hf_command(pythons.quant, backend, weights, models.scale, size)
    command += ["--bits", str(bits)]
    return worker_entry(
        Job(name, "peer", command, environment(size.threads), weights), models, size
    )


def kvpress_entry(
    models: Models, pythons: Pythons, press: str, size: Size, reads: bool = False
) -> Entry:
    """kvpress keeping a fifth of the tokens, on the transformers that it resolves."""
    command = hf_command(pythons.kvpress, "kvpress", "float32", models.scale, size)
    command += ["--press", press, "--keep", str(KEPT), *(["--reads"] if reads else [])]
    detail = "masks what it drops and holds every token" if press == "AdaKV" else ""
    job = Job(
        f"kvpress {press} {KEPT:.0%}".replace("%", " %"), "peer", command,
        environment(size.threads), "float32", prompt=True, reads=reads, detail=detail,
    )  # fmt: skip
    return worker_entry(job, models, size)


def vllm_entry(
    models: Models, pythons: Pythons, folder: Path, size: Size, reads: bool = False
) -> Entry:
    """vLLM on the very weights, in bfloat16, with as many threads."""
    command = [str(pythons.vllm), str(VLLM_WORKER), "--model", str(folder)]
    command += ["--context", str(size.context_tokens), "--batch", str(size.batch)]
    command += ["--room", str(size.room_tokens + ROWS_APART), *(["--reads"] if reads else [])]
    job = Job(
        "vLLM bfloat16", "peer", command, environment(size.threads, "default"), "bfloat16",
        prompt=True, reads=reads, detail="its own scheduler and sampling included",
    )  # fmt: skip
    return worker_entry(job, models, size, before=lambda: models.saved(folder))


def hf_command(python: Path, cache: str, weights: str, scale: str, size: Size) -> list[str]:
    return [
        str(python), str(HF_WORKER), "--cache", cache, "--weights", weights, "--scale", scale,
        "--context", str(size.context_tokens), "--batch", str(size.batch),
        "--room", str(size.room_tokens), "--threads", str(size.threads),
    ]  # fmt: skip


def worker_entry(
    job: Job, models: Models, size: Size, before: Callable[[], object] = lambda: None
) -> Entry:
    """A case that a worker runs; it starts when the entry is set up.

    Args:
        before: what has to be there for it.
    """

    def make() -> Ready:
        if not Path(job.command[0]).exists():
            place = Path(job.command[0]).parents[1].name
            raise WorkerError(f"there is no {place}: see the Makefile for how it is made")
        before()
        model = models(job.weights)
        worker = Worker(job.command, job.environment)
        prompt = worker.facts.get("prompt")
        versions: dict[str, str] = worker.facts["versions"]
        used = [f"{name} {number}" for name, number in versions.items()]
        used += [f"{name} preloaded" for name in worker.facts.get("preloaded", ())]
        facts = Facts(
            name=job.name, kind=job.kind, context_tokens=size.context_tokens, batch=size.batch,
            threads=size.threads, weights=job.weights, kv_bytes=worker.facts["kv_bytes"],
            weights_bytes=weights_bytes(model),
            read_bytes=None if job.reads else step_weight_bytes(model) + worker.facts["kv_bytes"],
            fill="prompt" if job.prompt else "synthetic",
            process="own",
            prompt=None if prompt is None or job.reads else Timing.of(Samples([Window(**prompt)])),
            detail="; ".join(x for x in (job.detail, ", ".join(used)) if x),
        )  # fmt: skip
        case = Case(job.name, lambda steps: Window(**worker.window(steps)))
        return Ready(case, facts, worker.close)

    # torch, the model in float32 and a cache, twice where it is copied
    return Entry(job.name, job.kind, make, needs_bytes=2 * 2**30)
