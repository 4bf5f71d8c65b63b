"""Mutants of saved caches: sealed with the digest that their bytes have, loaded, and decoded on."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

import torch

from kvcompress.errors import KVCompressError
from kvcompress.plan import Budget, FastGenChoice, HeadPlan, PerRequest, PooledBudget
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.cache.new import new_cache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.names import as_argument
from kvcompress.runtime.saved.cachefile import CacheFileError
from tests.fuzz.mutate import (
    TEXTS,
    Safetensors,
    mutate_bytes,
    mutate_safetensors,
    mutate_tree,
)
from tests.fuzz.run import refusal
from tests.runtime.models import VOCAB, build
from tests.runtime.test_persist import MIXED, params_for, plan_for, talk

_ZEROS: Final = b"0" * 64
_SEAL: Final = b'"sha256":"'
_CLASSES: Final = {"special": True, "punct": True}
_SCORED: Final = [
    HeadPlan(**_CLASSES, frequent=Budget(tokens=9), local=Budget(ratio=0.3), k_dtype="int4"),
    HeadPlan(**_CLASSES, frequent=Budget(ratio=0.4), local=Budget(tokens=6), v_dtype="int4"),
]


class Seed:
    """A model with a plan, and the file of a cache that it filled."""

    def __init__(
        self,
        family: str,
        heads: list[HeadPlan],
        folder: Path,
        per_request: PerRequest | None = None,
        **settings: Any,
    ) -> None:
        self.model = build(family)
        plan = plan_for(self.model, heads, **settings)
        self.plan = plan.model_copy(update={"per_request": per_request})
        attach(self.model, self.plan, params_for(self.plan))
        spans = [[(3, 9), (30, 35)], [(20, 24)]] if per_request is None else ()
        cache = new_cache(self.model, protect=spans)
        talk(self.model, cache, [7, 0], 40, 1, 1, 1, 12, 1, 1)
        path = folder / "seed.kvc"
        cache.save(path)
        self.file = Safetensors.of(path.read_bytes())
        assert sealed(self.file) == path.read_bytes()


def seeds(folder: Path) -> list[Seed]:
    """Groups of every storage, protected spans and turns; sliding, chunked and full layers;
    latents; states of linear attention; and the rules that grant budgets at a prompt's end."""
    return [
        Seed("llama", MIXED, folder, turn_tokens=2),
        Seed("gemma2", MIXED, folder),
        Seed("llama4", MIXED, folder),
        Seed("deepseek_v3", MIXED, folder),
        Seed("qwen3_next", MIXED, folder),
        Seed("llama", _SCORED, folder, per_request=FastGenChoice(kind="fastgen", recovery=0.7)),
        Seed("llama", _SCORED, folder, per_request=PooledBudget(kind="pooled", floor=0.2)),
    ]


def sealed(file: Safetensors) -> bytes:
    """The bytes of a file, with the digest that they have in its place."""
    assert file.metadata is not None
    if isinstance(file.metadata, dict) and "sha256" in file.metadata:
        file.metadata["sha256"] = _ZEROS.decode()
    return seal(file.raw())


def seal(raw: bytes) -> bytes:
    """`raw` with its digest, where there is room for one."""
    unsealed = raw[:1000]
    at = unsealed.find(_SEAL)
    if at < 0:
        return raw
    start = at + len(_SEAL)
    raw = raw[:start] + _ZEROS + raw[start + 64 :]
    return raw[:start] + hashlib.sha256(raw).hexdigest().encode() + raw[start + 64 :]


def mutant(rng: Random, file: Safetensors) -> bytes:
    """A file of the same seal and other contents."""
    kind = rng.random()
    if kind < 0.04:
        return _bent_header(rng, file)
    file = Safetensors(copy.deepcopy(file.metadata), copy.deepcopy(file.entries), file.data)
    assert file.metadata is not None
    if kind < 0.55:
        _bend_host(rng, file.metadata)
    elif kind < 0.62:
        key = rng.choice([key for key in file.metadata if key != "sha256"])
        file.metadata[key] = rng.choice(
            (rng.choice(TEXTS), rng.choice(list(file.metadata.values())), file.metadata[key] + "0")
        )
    for _ in range(rng.choice((0, 0, 1)) if kind < 0.62 else rng.choice((1, 1, 2))):
        file = mutate_safetensors(rng, file)
    return sealed(file)


def _bend_host(rng: Random, metadata: dict[str, Any]) -> None:
    """Counters of one layer, or of all layers in the same way: a lie that is told everywhere."""
    host = json.loads(metadata["host"])
    if rng.random() < 0.3:
        _everywhere(rng, host)
    else:
        host = mutate_tree(rng, host)
    text = json.dumps(host)
    metadata["host"] = text if rng.random() < 0.97 else mutate_bytes(rng, text.encode()).decode(
        "utf-8", "replace"
    )  # fmt: skip


def _everywhere(rng: Random, host: Any) -> None:
    """The same number changed in the same place of every layer."""
    layers = [layer for layer in host["layers"] if layer is not None and layer.get("state")]
    paths = [path for path in _paths(layers[0]) if type(_at(layers[0], path)) is int]
    path, change = rng.choice(paths), rng.choice((1, -1, 2, 32, -32, 1 << 20, 1 << 31, 1 << 62))
    for layer in layers:
        try:
            holder = _at(layer, path[:-1])
            holder[path[-1]] += change
        except (KeyError, IndexError, TypeError):
            continue


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    left: list[tuple[Any, ...]] = [()]
    while left:
        path = left.pop()
        now = _at(tree, path)
        if isinstance(now, dict | list):
            left += [(*path, key) for key in (now if isinstance(now, dict) else range(len(now)))]
        elif path:
            found.append(path)
    return found


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _bent_header(rng: Random, file: Safetensors) -> bytes:
    """Bytes of the header flipped, its length another, or its JSON bent as a whole."""
    kind = rng.randrange(3)
    header, data = file.header(), file.data
    if kind == 0:
        header = mutate_bytes(rng, header)
        return seal(len(header).to_bytes(8, "little") + header + data)
    if kind == 1:
        length = rng.choice((0, 1, 88, len(header) - 8, len(header) + 8, 1 << 30, (1 << 64) - 1))
        return seal(length.to_bytes(8, "little") + header + data)
    tree = {"__metadata__": file.metadata, **file.entries}
    text = json.dumps(mutate_tree(rng, tree), separators=(",", ":")).encode()
    return seal(len(text).to_bytes(8, "little") + text + data)


def prepare(folder: Path) -> Callable[[Random, Path], str]:
    known = seeds(folder)

    def trial(rng: Random, folder: Path) -> str:
        seed = rng.choice(known)
        path = folder / "mutant.kvc"
        path.write_bytes(mutant(rng, seed.file))
        try:
            cache = CompressedCache.load(path, seed.model)
        except KVCompressError as error:
            return refusal(error, CacheFileError)
        try:
            go_on(seed.model, cache)
        except KVCompressError as error:  # such as rows that cannot move while a draft waits
            return refusal(error, KVCompressError, "loaded, then told")
        return "loaded"

    return trial


@torch.no_grad()
def go_on(model: Any, cache: CompressedCache) -> None:
    """Decode, take in a turn, move the rows, and decode: all that reads what was loaded."""
    batch = next(layer.state.batch for layer in cache.compressed_layers if layer.state is not None)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 1, 3, 1):
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        seen = int(cache.get_seq_length())
        mask = torch.ones(batch, seen + length, dtype=torch.long)
        first = cache.compressed_layers[0].state
        assert first is not None
        for row, real in enumerate(first.row_seen):
            mask[row, : seen - real] = 0
        positions = (mask.cumsum(1)[:, seen:] - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, **as_argument(cache))
    cache.reorder_cache(torch.arange(batch - 1, -1, -1))
    model(input_ids=torch.full((batch, 1), 5), **as_argument(cache))
