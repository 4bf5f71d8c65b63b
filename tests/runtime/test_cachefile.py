"""A cache file is whole, ours and of this version, or it is refused."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from kvcompress.plan import Budget, HeadPlan
from kvcompress.runtime.cache.cache import CompressedCache
from kvcompress.runtime.hf.attach import attach
from kvcompress.runtime.saved import cachefile
from kvcompress.runtime.saved.cachefile import CacheFileError
from kvcompress.runtime.saved.persist import load_cache, save_cache
from tests.runtime.models import build
from tests.runtime.test_persist import plan_for, talk


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of a few thousand bytes, its plan and params."""
    model = build("llama")
    plan = plan_for(model, [HeadPlan(frequent=Budget(tokens=3))], recent_tokens=2, sink_tokens=1)
    attach(model, plan)
    cache = CompressedCache(plan)
    talk(model, cache, [0], 12)
    path = tmp_path_factory.mktemp("small") / "cache.kvc"
    save_cache(cache, path)
    return model, plan, path.read_bytes()


def test_a_flipped_byte_anywhere_is_refused(small, tmp_path):
    _, plan, data = small
    path = tmp_path / "cache.kvc"
    path.write_bytes(data)
    load_cache(CompressedCache, path, plan)
    header = 8 + int.from_bytes(data[:8], "little")
    for at in (*range(header), *range(header, len(data), 7), len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        with pytest.raises(CacheFileError, match=r"cache\.kvc: .*") as caught:
            load_cache(CompressedCache, path, plan)
        assert "\n" not in str(caught.value)
        if at >= header:
            assert "damaged (its sha256 is another)" in str(caught.value)


def test_a_file_of_another_length_is_refused(small, tmp_path):
    _, plan, data = small
    path = tmp_path / "cache.kvc"
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 7, 8, 20, 100, header - 1, header, header + 1, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CacheFileError, match="damaged|not a cache file"):
            load_cache(CompressedCache, path, plan)
    path.write_bytes(data + b"\0")
    with pytest.raises(CacheFileError, match="damaged .*bytes of tensors, its header says"):
        load_cache(CompressedCache, path, plan)


def test_foreign_files_are_refused(small, tmp_path):
    _, plan, _ = small
    with pytest.raises(CacheFileError, match=r"none\.kvc: cannot be read \(No such file"):
        load_cache(CompressedCache, tmp_path / "none.kvc", plan)
    with pytest.raises(CacheFileError, match="not a plain file"):
        load_cache(CompressedCache, tmp_path, plan)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheFileError, match="not a plain file"):
        load_cache(CompressedCache, tmp_path / "pipe", plan)
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CacheFileError, match="not a cache file of kvcompress"):
        load_cache(CompressedCache, tmp_path / "other.safetensors", plan)
    torch.save({"x": torch.zeros(3)}, tmp_path / "pickle.pt")
    with pytest.raises(CacheFileError, match="not a cache file of kvcompress"):
        load_cache(CompressedCache, tmp_path / "pickle.pt", plan)


def test_a_newer_schema_is_refused(small, tmp_path):
    _, plan, data = small
    path = tmp_path / "cache.kvc"
    path.write_bytes(data)
    metadata, tensors = cachefile.read(path, lambda found, declared: None)
    del metadata["sha256"]
    cachefile.write(path, metadata, tensors)
    assert path.read_bytes() == data
    cachefile.write(path, {**metadata, "schema_version": "4"}, tensors)
    with pytest.raises(CacheFileError, match="schema 4 by kvcompress .*reads schema 3; upgrade"):
        load_cache(CompressedCache, path, plan)
    cachefile.write(path, metadata, dict(list(tensors.items())[1:]))
    with pytest.raises(CacheFileError, match="layers.0.state.exact_k is None, not"):
        load_cache(CompressedCache, path, plan)


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    model, plan, data = small
    saved = tmp_path / "cache.kvc"
    saved.write_bytes(data)
    cache = load_cache(CompressedCache, saved, plan, model=model)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheFileError, match="cannot be written .No space left"):
        save_cache(cache, saved)
    assert saved.read_bytes() == data
    assert list(tmp_path.iterdir()) == [saved]
    with pytest.raises(CacheFileError, match="cannot be written .No such file"):
        save_cache(cache, tmp_path / "nowhere" / "cache.kvc")
