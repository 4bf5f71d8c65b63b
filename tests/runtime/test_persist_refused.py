"""What a sealed file may not say: each lie is refused before a tensor is read, in one line."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.saved.cachefile import CacheFileError
from tests.fuzz.caches import Seed, seal, sealed
from tests.fuzz.mutate import Safetensors
from tests.runtime.test_persist import MIXED


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Seed:
    return Seed("llama", MIXED, tmp_path_factory.mktemp("seed"), turn_tokens=2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Seed:
    return Seed("qwen3_next", MIXED, tmp_path_factory.mktemp("seed"))


def refused(path, model, match: str) -> None:
    began = time.monotonic()
    with pytest.raises(CacheFileError, match=match) as caught:
        CompressedCache.load(path, model)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def host_of(bend: Callable[[Any], None]) -> Callable[[Safetensors], None]:
    def change(file: Safetensors) -> None:
        host = json.loads(file.metadata["host"])
        bend(host)
        file.metadata["host"] = json.dumps(host)

    return change


def first(host: Any) -> Any:
    return host["layers"][0]["state"]


def everywhere(name: str, value: Any) -> Callable[[Any], None]:
    def bend(host: Any) -> None:
        for layer in host["layers"]:
            (layer if name in layer else layer["state"])[name] = copy.deepcopy(value)

    return bend


def shifted(host: Any) -> None:
    """The layout that made C write outside of its arrays."""
    for layer in host["layers"]:
        for group in layer["state"]["groups"]:
            group["store"]["capacities"][0][0] += 1 << 22
            group["store"]["capacities"][-1][-1] -= 1 << 22


COUNTERS = {
    "capacities that cancel out": (shifted, "capacities are what the plan grants"),
    "True for a number": (lambda h: first(h).update(first_vote=True), "types that counters have"),
    "a number too large": (everywhere("row_seen", [1 << 62, 1 << 62]), "at most the tokens"),
    "a key more": (lambda h: h.update(x=1), "its JSON says more or less"),
    "a key more in a state": (lambda h: first(h).update(x=1), "x"),
    "a key less": (lambda h: h.pop("assists"), "assists"),
    "a layer more": (lambda h: h["layers"].append(h["layers"][0]), "zip"),
    "a layer less": (lambda h: h["layers"].pop(), "zip"),
    "a number for a tensor": (lambda h: first(h).update(exact_k=1), "its JSON says more or less"),
    "layers that disagree": (
        lambda h: h["layers"][1].update(seen=58), "every layer has seen the same tokens"
    ),
    "a way of its own": (lambda h: h.update(compress="never"), "give per_chunk or after_prefill"),
    "a truth that is a number": (lambda h: h.update(assists=1), "types that counters have"),
    "a digest of other rows": (lambda h: h["token_digest"]["rows"].pop(), "one sha256 for a row"),
    "a digest too short": (
        lambda h: h["token_digest"].update(rows=["00"] * 2), "one sha256 for a row"
    ),
    "a digest that is none": (
        lambda h: h["token_digest"].update(rows=["x" * 64] * 2), "non-hexadecimal"
    ),
    "a digest of the future": (lambda h: h["token_digest"].update(tokens=58), "that were seen"),
    "spans without end": (lambda h: h.update(protect=[{"range": [0, 10**30]}]), "64 bits"),
    "spans that overlap": (
        lambda h: h.update(protect=[{"range": [0, 9]}, {"range": [3, 9]}]), "overlap"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTERS)
def test_counters(name, seed, tmp_path):
    bend, match = COUNTERS[name]
    file = copy.deepcopy(seed.file)
    host_of(bend)(file)
    (tmp_path / "x.kvc").write_bytes(sealed(file))
    refused(tmp_path / "x.kvc", seed.model, match)


def _entry(**values: Any) -> Callable[[Safetensors], None]:
    def change(file: Safetensors) -> None:
        file.entries["layers.0.state.exact_k"].update(values)

    return change


def _one_more(file: Safetensors) -> None:
    size = len(file.data)
    file.entries["x"] = {"dtype": "U8", "shape": [8], "data_offsets": [size, size + 8]}
    file.data += b"\0" * 8


def _meta(**values: str) -> Callable[[Safetensors], None]:
    return lambda file: file.metadata.update(values)


HEADERS = {
    "a tensor more": (_one_more, "x belongs to nothing"),
    "another dtype of the same width": (_entry(dtype="I32"), "exact_k is .*int32"),
    "a dtype that is unknown": (_entry(dtype="I4"), "list of tensors cannot be read"),
    "another shape of the same size": (_entry(shape=[2, 2, 16, 7]), "exact_k is .*16, 7"),
    "2^40 elements": (_entry(shape=[1 << 40]), "list of tensors cannot be read"),
    "2^60 elements of nothing": (_entry(shape=[1 << 60, 0]), "list of tensors cannot be read"),
    "a negative size": (_entry(shape=[-2, -2, 7, 16]), "list of tensors cannot be read"),
    "sizes that are floats": (_entry(shape=[2.0, 2, 7, 16]), "list of tensors cannot be read"),
    "an entry with more": (_entry(x=1), "list of tensors cannot be read"),
    "another batch": (_meta(batch="1"), "one entry for a row"),
    "a batch without end": (_meta(batch="4000000000"), "one entry for a row"),
    "other tokens": (_meta(tokens="5"), "metadata do not fit"),
    "a dtype of no model": (_meta(dtype="int64"), "made with a model of another dtype"),
    "a version that is no text": (_meta(kvcompress=5), "header cannot be read"),
    "a schema in other digits": (_meta(schema_version="٢"), "header cannot be read"),
    "NaN in its JSON": (
        lambda f: f.metadata.update(host=f.metadata["host"].replace("false", "NaN", 1)), "NaN"
    ),
    "a key that comes twice": (
        lambda f: f.metadata.update(host='{"assists":true,' + f.metadata["host"][1:]), "twice"
    ),
    "brackets without end": (
        lambda f: f.metadata.update(host="[" * 100_000 + "]" * 100_000), "levels deep"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name, seed, tmp_path):
    change, match = HEADERS[name]
    file = copy.deepcopy(seed.file)
    change(file)
    (tmp_path / "x.kvc").write_bytes(sealed(file))
    refused(tmp_path / "x.kvc", seed.model, match)


def test_a_file_of_holes_is_refused_before_it_is_read(seed, tmp_path):
    """A tensor of 2^40 bytes in a file that has them, as far as its length goes."""
    file = copy.deepcopy(seed.file)
    size = len(file.data)
    file.entries["x"] = {
        "dtype": "U8",
        "shape": [1 << 40],
        "data_offsets": [size, size + (1 << 40)],
    }
    path = tmp_path / "x.kvc"
    path.write_bytes(sealed(file))
    os.truncate(path, path.stat().st_size + (1 << 40))
    refused(path, seed.model, "x belongs to nothing")


def test_a_header_of_16_megabytes_is_the_longest(seed, tmp_path):
    file = copy.deepcopy(seed.file)
    file.metadata["x"] = "x" * (1 << 24)
    (tmp_path / "x.kvc").write_bytes(sealed(file))
    refused(tmp_path / "x.kvc", seed.model, "with a header of")


def test_a_seal_alone_is_not_enough(seed, tmp_path):
    path = tmp_path / "x.kvc"
    path.write_bytes(seal(sealed(seed.file)))
    CompressedCache.load(path, seed.model)
    path.write_bytes(sealed(seed.file)[:-1] + b"\xff")
    refused(path, seed.model, "its sha256 is another")


@pytest.mark.parametrize("kind", ["conv_states", "recurrent_states"])
def test_states_of_linear_attention_are_those_of_the_model(kind, hybrid, tmp_path):
    path = tmp_path / "x.kvc"
    path.write_bytes(sealed(hybrid.file))
    CompressedCache.load(path, hybrid.model)
    name = next(name for name in hybrid.file.entries if kind in name)
    file = copy.deepcopy(hybrid.file)
    shape = file.entries[name]["shape"]
    shape[1], shape[-1] = shape[-1], shape[1]
    path.write_bytes(sealed(file))
    refused(path, hybrid.model, f"{name} is ")
    file = copy.deepcopy(hybrid.file)
    start = file.entries[name]["data_offsets"][0]
    nan = torch.tensor([torch.nan]).numpy().tobytes()
    file.data = file.data[:start] + nan + file.data[start + 4 :]
    path.write_bytes(sealed(file))
    refused(path, hybrid.model, "states of linear attention are finite")
    file = copy.deepcopy(hybrid.file)
    host_of(
        lambda host: next(h for h in host["layers"] if "kernel" in h)["kernel"].append(1 << 40)
    )(file)
    path.write_bytes(sealed(file))
    refused(path, hybrid.model, "its JSON says more or less")
