"""`kvcompress bench`: a user's own model beside transformers' caches, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, get_args

import torch

from kvcompress.bench.cell import Note, Rounds, run_cell
from kvcompress.bench.compressed import synthetic_refusal
from kvcompress.bench.entries import (
    Entry,
    Fill,
    Holder,
    Size,
    compressed_holder,
    dynamic_holder,
    entry_of,
    quantized_holder,
    static_holder,
)
from kvcompress.bench.result import Conditions, Kind, Result
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.compare import Row as PlanRow
from kvcompress.evaluate.serving import model_shape
from kvcompress.kernels.cpu.library import library, why_not

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
from kvcompress.measure import machine

# name on the command line to the name of the row, and how such a cache is made
PEERS: Final[dict[str, tuple[str, Callable[[PretrainedConfig], Holder]]]] = {
    "dynamic": ("DynamicCache", dynamic_holder),
    "static": ("StaticCache", static_holder),
    "quantized-fp8": ("QuantizedCache fp8", lambda config: quantized_holder(config, "fp8")),
    "quantized-quanto": (
        "QuantizedCache quanto int4",
        lambda config: quantized_holder(config, "quanto", 4),
    ),
    "quantized-hqq": ("QuantizedCache hqq int4", lambda config: quantized_holder(config, "hqq", 4)),
}
# on a CPU sdpa has a fast kernel for grouped queries in float32 only; without a mask, transformers
# leaves the grouping to it
GQA_DETAIL: Final = "16-bit grouped queries without a mask: sdpa takes a slow path on CPUs"
_PACKAGES: Final = ("kvcompress", "torch", "transformers", "optimum-quanto", "hqq")


def bench(
    model: PreTrainedModel,
    own: Sequence[PlanRow],
    peers: Sequence[str],
    size: Size,
    rounds: Rounds,
    *,
    model_name: str,
    malloc: str,
    command: str,
    note: Note = lambda text: None,
    finished: Callable[[int], object] = lambda done: None,
) -> Result:
    """Decode steps of every cache at one context and batch.

    Args:
        size: its room is replaced by what `rounds` need.
        peers: names of `PEERS`.

    Raises:
        ValueError: for an unknown peer, or a context that the model has no positions for.
        KVCompressError: for synthetic keys where a plan needs a real prompt.
    """
    device = model.device
    entries = make_entries(model, own, peers, size, rounds)
    cell = run_cell(
        f"{size.context_tokens} tokens, batch {size.batch}",
        entries,
        rounds,
        threads=(size.threads,),
        note=note,
        finished=finished,
        device=device,
    )
    return Result(
        benchmark="bench",
        command=command,
        date=machine.today(),
        conditions=conditions(model_name, device_words(device), malloc),
        frequency_mhz=machine.frequency_mhz(),
        cells=(cell,),
    )


def make_entries(
    model: PreTrainedModel, own: Sequence[PlanRow], peers: Sequence[str], size: Size, rounds: Rounds
) -> list[Entry]:
    """Rivals first, then the limit of a cache of 32 tokens, then ours; errors as for `bench`."""
    wrong = sorted(set(peers) - set(PEERS))
    if wrong:
        raise ValueError(f"unknown peers {', '.join(wrong)}: choose from {', '.join(PEERS)}")
    limit, last = model_shape(model).max_position, size.context_tokens + rounds.room_tokens
    if last > limit:
        raise ValueError(
            f"{size.context_tokens} tokens of context and {rounds.room_tokens} steps pass the "
            f"{limit} positions of the model: use a context of at most {limit - rounds.room_tokens}"
        )
    if size.fill == "synthetic":
        for each in own:
            reason = synthetic_refusal(each.plan)
            if reason is not None:
                raise KVCompressError(
                    f"{each.name}: random keys cannot stand for a prompt, the plan has {reason}: "
                    "use --fill prompt"
                )
    roomy = with_room(size, rounds)
    made = []
    for peer in peers:
        kind, detail = peer_kind(peer, model)
        name, hold = PEERS[peer]
        made.append(entry_of(name, kind, model, hold(model.config), roomy, detail=detail))
    short = with_room(Size(32, size.batch, 0, size.threads, size.fill), rounds)
    dynamic = dynamic_holder(model.config)
    made.append(entry_of("32 tokens of cache", "limit", model, dynamic, short))
    for each in own:
        holder = compressed_holder(model, each.plan, each.params)
        made.append(entry_of(each.name, "ours", model, holder, roomy))
    return made


def with_room(size: Size, rounds: Rounds) -> Size:
    return replace(size, room_tokens=rounds.room_tokens)


def peer_kind(peer: str, model: PreTrainedModel) -> tuple[Kind, str]:
    """Whether a rival is a fair one for this model, and what to say if not."""
    shape = model_shape(model)
    grouped = shape.query_heads != shape.kv_heads
    slow = peer == "dynamic" and grouped and model.dtype == torch.bfloat16
    if slow and model.device.type == "cpu":
        return "artefact", GQA_DETAIL
    return "peer", ""


def conditions(model: str, device: str, malloc: str) -> Conditions:
    return Conditions(
        cpu=machine.cpu_words(),
        cores=torch.multiprocessing.cpu_count(),
        memory_bytes=machine.memory_bytes(),
        last_cache_bytes=machine.largest_cache_bytes(),
        device=device,
        malloc=malloc,
        model=model,
        kernels=kernel_words(),
        versions=machine.versions(*_PACKAGES),
    )


def kernel_words() -> str:
    """What computes attention over codes on a CPU."""
    found = library()
    if found is None:
        return f"PyTorch ({why_not()})"
    return f"C, {found.isa}"


def device_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fill_of(text: str) -> Fill:
    """``synthetic`` or ``prompt``.

    Raises:
        ValueError: for anything else.
    """
    found = next((each for each in get_args(Fill) if each == text), None)
    if found is None:
        raise ValueError(f"--fill {text}: choose synthetic or prompt")
    return found
